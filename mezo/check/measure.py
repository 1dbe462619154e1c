"""`mezo check`: examine a model, a prompt, eps and the learning rate by a dozen estimates.

The arithmetic of the gradient, the curvature and the best rate is in mezo/runs/examiner.py.
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from mezo import tasks
from mezo.check.findings import STEPS, Measurements, advice, findings
from mezo.compare.paper_grids import GRIDS
from mezo.errors import InputError
from mezo.evaluation.evaluate import Result, evaluate
from mezo.memory.measured import PeakMemory
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.frozen import FrozenLower
from mezo.models.modes import evaluating, unwrap
from mezo.models.trainable import select
from mezo.objectives import Batch, Causal, Feature, Form, Masked
from mezo.objectives.progress import SILENT, Progress
from mezo.runs import rates
from mezo.runs.data import load_splits, task_of
from mezo.runs.data_arguments import DataArguments
from mezo.runs.examiner import ERRORS, Examiner, Landscape, best_step, mean_error
from mezo.runs.result import environment
from mezo.runs.task import form_of
from mezo.watch import last_place

SHOWN = 200  # dev examples for the zero-shot accuracy
SCANNED = 4  # number of directions that are also estimated at eps / 10 and 10 eps
IN_PAPER = {  # kind of tuning -> suffix of its grids' names
    "all weights": "mezo",
    "a part of the weights": "mezo",
    "LORA": "mezo-lora",
    "PREFIX_TUNING": "mezo-prefix",
}


def of_paper(kind: str) -> tuple[str, str] | None:
    """Return the learning rates and eps of Tables 15 and 16, or None for a kind not in them."""
    if kind not in IN_PAPER:
        return None
    tables = {"RoBERTa-large": "table15", "OPT": "table16"}
    grids = {model: GRIDS[f"{table}-{IN_PAPER[kind]}"] for model, table in tables.items()}
    ends = {m: (min(g["learning_rate"]), max(g["learning_rate"])) for m, g in grids.items()}
    text = ", ".join(f"{low:.0e} to {high:.0e} for {m}" for m, (low, high) in ends.items())
    eps = dict.fromkeys(f"{grid['mezo_eps']:.0e}" for grid in grids.values())
    return f"{text} (Tables 15, 16)".replace("e-0", "e-"), " or ".join(eps).replace("e-0", "e-")


def changes(grads: np.ndarray) -> tuple[float, float]:
    """Return the relative rms changes of g from eps to eps / 10 and to 10 eps.

    `grads` has the shape (directions, 3), for eps / 10, eps and 10 eps.
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # of infinite losses, or of none: NaN
        low, size, high = np.sqrt(((grads - grads[:, 1:2] * [1, 0, 1]) ** 2).mean(0))
        return float(low / size), float(high / size)


def reach(eps: float, high: float) -> float:
    """Return how far along z the slope is valid: until it changes by 1/4, and at most 10 eps.

    The change is assumed to grow as eps^2; `high` is the relative change at 10 eps.
    """
    return 10 * eps * min(1.0, math.sqrt(0.25 / high)) if high > 0 else eps


def check(
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    eps: float | None = None,
    lr: float | None = None,
    batch_size: int = 16,
    directions: int = 12,
    steps: int = STEPS,
    seed: int = 42,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure a model on a task, and return the numbers, "findings" and "next", fit for JSON.

    Each finding has a "text" and a "level": "ok", "note" or "warning". "next" holds the advised
    options of `mezo train`.

    Args:
        model_args: The model, and which of its weights would be trained.
        data_args: The task and its examples; it must be a classification task.
        eps: Size of the perturbation; None uses that of `mezo train`.
        lr: Learning rate to judge; None uses that of `mezo train`.
        batch_size: Batch size of the planned run.
        directions: Number of directions; each takes two estimates and a forward pass.
        steps: Length of the planned run, at a constant rate.
        seed: Seed of the directions and of the choice of examples.
        progress: Where lines about how far it is go.

    Raises InputError for values out of range, tasks without fixed candidates or too little data.
    """
    for name, value in {"eps": eps, "lr": lr}.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be positive, got {value}")
    counts = (("batch_size", batch_size, 1), ("directions", directions, 2), ("steps", steps, 1))
    for name, count, least in counts:
        if count < least:
            raise InputError(f"{name} must be at least {least}, got {count}")
    began, task = time.perf_counter(), task_of(data_args)
    if task.kind != "classification":
        raise InputError(f"mezo check looks at fixed candidates: task {task.name} has none")
    splits = load_splits(task, data_args)
    size = min(batch_size, len(splits["train"]) // 2)
    if size == 0:
        raise InputError("there is 1 training example: two batches need two")
    train = tasks.sample(splits["train"], 2 * size * directions, seed)
    rate, own = rates.mezo(models.parameters_of(model_args), rates.part_of(model_args))
    lr, eps = (rate if lr is None else lr), (own if eps is None else eps)
    model, tokenizer = models.load(model_args, adapter_seed=seed)
    form = form_of(model, tokenizer, task, model_args, data_args)
    if model_args.trainable is not None:
        select(model, model_args.trainable)
    layers, features = model_args.freeze_layers, [form.encode(example) for example in train]
    found: dict[str, Any] = {"model": model_args.model_name_or_path, "task": task.name}
    found |= {"eps": eps, "lr": lr, "batch_size": size, "asked": batch_size, "steps": steps}
    with FrozenLower(model, layers) if layers else nullcontext(), evaluating(model):
        examiner, dev = Examiner(model, form, seed), tasks.sample(splits["dev"], SHOWN, seed)
        found |= {"trained": _trained(examiner), "candidates": _candidates(form, features[:SHOWN])}
        found["prompt"] = _prompt(form, evaluate(model, form, dev, progress=progress))
        longest = sorted(features, key=lambda feature: feature["length"])[-size:]
        found |= _repeated(examiner, examiner.batch(longest), eps)
        found |= measure(examiner, features, eps, size, directions, steps, progress)
    found |= {"seconds": time.perf_counter() - began, "environment": environment()}
    found = json.loads(json.dumps(found), parse_constant=lambda word: None)  # NaN is no JSON
    measurements = Measurements.of(found)
    return found | {"next": advice(measurements), "findings": findings(measurements)}


def measure(
    examiner: Examiner,
    features: list[Feature],
    eps: float,
    size: int,
    n: int,
    steps: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure gradient, curvature, eps and time, on two disjoint batches along n directions."""
    rows, scan, loop = [], [], progress.of("direction", n)
    for d, (one, two) in enumerate(examiner.pairs(features, size, n)):
        began = time.perf_counter()
        loss = examiner.loss(one)
        rows.append(
            (loss, time.perf_counter() - began, examiner(one, d, eps), examiner(two, d, eps))
        )
        if d < SCANNED:
            low, high = (examiner(one, d, other).grad for other in (eps / 10, 10 * eps))
            scan.append([low, rows[-1][2].grad, high])
        loop.at(d + 1)
    seconds = [seen.seconds for row in rows for seen in row[2:]]
    found: dict[str, Any] = {"directions": n, "step_seconds": float(np.median(seconds))}
    found["forward_seconds"] = float(np.median([row[1] for row in rows]))
    rows = [row for row in rows if math.isfinite(row[0] + row[2].grad + row[3].grad)]
    if len(rows) < 2:
        lost = f"the loss is finite along {len(rows)} of {n} directions"
        raise InputError(f"{lost}: lower eps, take bfloat16 or float32, or look at the data")
    low, high = changes(np.array(scan))
    found |= {"lost": n - len(rows), "eps_low": low, "eps_high": high}
    found |= _numbers(rows, eps, size, reach(eps, high), steps)
    unit, dtype = last_place(examiner.trained)
    value = torch.tensor(found["loss"], dtype=unwrap(examiner.model).dtype)
    found |= {"last_place": unit, "last_place_of": str(dtype).removeprefix("torch.")}
    found["spacing"] = last_place([value])[0]
    if found["gap"] <= found["spacing"] or eps < unit / 2:  # only rounding was measured
        found["best_lr"] = found["run_lr"] = math.nan
    return found


def _numbers(rows: list, eps: float, size: int, longest: float, steps: int) -> dict[str, Any]:
    """Return the numbers about gradient, curvature and rates, from (loss, seconds, Seen, Seen)."""
    land = Landscape.of([(one, two) for _, _, one, two in rows], size)
    grads = np.array([[one.grad, two.grad] for _, _, one, two in rows])
    curved = np.array([(one.curvature + two.curvature) / 2 for _, _, one, two in rows])
    losses, ends = np.array([[loss, one.loss] for loss, _, one, _ in rows]).T
    second = 2 * (ends - losses) / eps**2  # z'Hz, as ends are means of two
    (trace, error), (hessian, off) = mean_error(curved), mean_error(second)
    best, limit = best_step(land.signal, land.pull), longest / max(land.size, 1e-300)
    most = min(1.0, land.gradient["share"] + ERRORS * land.gradient["share_error"])
    return land.gradient | {
        "clear": land.clear,
        "share_at_most": most,
        "signal_at_most": land.signal,
        "pull": land.pull,
        "mean_size": land.size,
        "std": float(grads.std()),
        "trace": trace,
        "trace_error": error,
        "hessian": hessian,
        "hessian_error": off,
        "gap": float(np.median(2 * eps * abs(grads))),
        "loss": float(np.mean(losses)),
        "best_lr": min(best, limit),
        "run_lr": min(land.horizon(steps).best_rate(), limit),
        "limited": limit < best,
    }


def _trained(examiner: Examiner) -> dict[str, Any]:
    every, adapters = list(examiner.model.parameters()), getattr(examiner.model, "peft_config", {})
    part = "all weights" if len(examiner.trained) == len(every) else "a part of the weights"
    config, group = unwrap(examiner.model).config.to_dict(), examiner.optimizer.param_groups[0]
    dropout = {p for key, p in config.items() if "drop" in key and isinstance(p, float)}
    dropout |= {m.p for m in examiner.model.modules() if isinstance(m, torch.nn.Dropout)}
    kinds = [str(adapter.peft_type.value) for adapter in adapters.values()]
    found: dict[str, Any] = {"kind": kinds[0] if kinds else part}
    found["paper"] = of_paper(found["kind"])
    found |= {
        "parameters": sum(p.numel() for p in examiner.trained),
        "tensors": len(examiner.trained),
    }
    found |= {"of": sum(p.numel() for p in every), "dropout": sorted(dropout - {0.0})}
    found |= {"dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in examiner.trained})}
    found |= {"perturbation": examiner.optimizer.perturbation, "rounding": group["rounding"]}
    return found | {"half": any(p.dtype.itemsize == 2 for p in examiner.trained)}


def _prompt(form: Form, found: Result) -> dict[str, Any]:
    labels, chance = form.task.labels, 1 / len(form.task.labels)
    counts = np.bincount([p for p in map(int, found.predictions) if p >= 0], minlength=len(labels))
    shown = {"accuracy": found.accuracy, "n": found.n, "chance": chance}
    shown |= {"chance_error": math.sqrt(chance * (1 - chance) / found.n)}
    return shown | {"favourite": labels[counts.argmax()], "share": float(counts.max() / found.n)}


def _candidates(form: Form, features: Sequence[Feature]) -> dict[str, list[str]]:
    """Return each candidate's tokens in context; if it names columns, those of its longest form."""
    rows = [[word] for word in form.words] if isinstance(form, Masked) else []
    texts = form.task.verbalizers
    if isinstance(form, Causal):
        texts = form.task.candidates
        rows = [max((f["targets"][k] for f in features), key=len) for k in range(len(texts))]
    words = [[str(t) for t in form.tokenizer.convert_ids_to_tokens(row)] for row in rows]
    return dict(zip(texts, words, strict=False))  # an encoder has none


def _repeated(examiner: Examiner, batch: Batch, eps: float) -> dict[str, Any]:
    """Repeat a forward pass and an estimate, compare the results, and measure their memory."""
    for p in examiner.model.parameters():
        p.detach().sum()  # files are mapped: a weight counts once it was read
    loss = examiner.loss(batch)
    with PeakMemory() as inference:
        same = examiner.loss(batch) == loss
    first = examiner(batch, 0, eps)  # loads kernels and thread pools
    with PeakMemory() as estimate:
        second = examiner(batch, 0, eps)
    off, size = abs(first.grad - second.grad), max(abs(first.grad), abs(second.grad))
    found = {"inference": inference.bytes, "estimate": estimate.bytes}
    found["weights"] = sum(p.nbytes for p in examiner.model.parameters())
    found["largest"] = max(p.nbytes for p in examiner.trained)
    return {"bytes": found, "same_forward": same, "differs": off / size if size > 0 else 0.0}
