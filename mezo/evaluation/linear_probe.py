"""Baselines that do not fine-tune the model: the model as it is, and a linear probe.

The other baselines are elsewhere: fine-tuning by back-propagation (`--method adam`) is the
Trainer's own, and learning in context is `mezo eval --demonstrations`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from mezo.errors import InputError
from mezo.evaluation.evaluate import Result, candidate_metrics
from mezo.evaluation.evaluate import evaluate as evaluate_form
from mezo.models.modes import evaluating, to_device, unwrap
from mezo.objectives import Causal, Encoder, Form, Masked
from mezo.objectives.encoder import embed
from mezo.objectives.progress import SILENT, Progress
from mezo.objectives.tokens import tokenize
from mezo.tasks import Example, Task
from mezo.tasks.task import fill

FOLDS = 5  # of the cross-validation that chooses the probe's regularisation


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on frozen features: label scores are features @ weight.T + bias."""

    weight: np.ndarray  # (labels, width)
    bias: np.ndarray  # (labels,)
    labels: tuple[int, ...]  # those that the training examples have

    def evaluate(self, features: np.ndarray, examples: Sequence[Example], task: Task) -> Result:
        """Return the result on `examples`; a label absent from training has probability 0."""
        scores = torch.full((len(features), len(task.labels)), -torch.inf, dtype=torch.float64)
        scores[:, list(self.labels)] = torch.from_numpy(features @ self.weight.T + self.bias)
        right = torch.tensor([example.label for example in examples])
        chosen = scores.argmax(-1)
        return Result(
            metrics=candidate_metrics(task, tuple(chosen.tolist()), examples),
            metric=task.metric,
            loss=torch.nn.functional.cross_entropy(scores, right).item(),
            predictions=tuple(chosen.tolist()),
            n=len(examples),
        )

    def save(self, folder: str | Path) -> int:
        """Write probe.safetensors into the folder; return its size in bytes.

        Of several processes, which all have fitted the same probe, the first alone writes it.
        """
        from safetensors.numpy import save

        data = save({"weight": self.weight, "bias": self.bias})
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            Path(folder, "probe.safetensors").write_bytes(data)
        return len(data)


def features_of(
    model: torch.nn.Module,
    form: Form,
    examples: Sequence[Example],
    batch_size: int = 32,
    progress: Progress = SILENT,
) -> np.ndarray:
    """Return the last hidden states (examples, width), in float64, where the head would read them.

    They are those of the prompt's last token for causal models, of the mask for masked models, and
    the average over the text for encoders.
    """
    if form.task.kind != "classification":
        raise InputError(f"task {form.task.name} has no labels: a linear probe needs them")
    pieces = []
    with evaluating(model):
        for start in progress.over(range(0, len(examples), batch_size), "batch of features"):
            part = examples[start : start + batch_size]
            pieces.append(_states(model, form, part).double().cpu().numpy())
    return np.concatenate(pieces)


def _states(model: torch.nn.Module, form: Form, examples: Sequence[Example]) -> torch.Tensor:
    encoded = [] if isinstance(form, Causal) else [form.encode(example) for example in examples]
    rows = [feature["input_ids"] for feature in encoded]
    rows = rows or [_prompt(form, example) for example in examples]
    batch = to_device(form._pad(rows, "right"), model)
    if isinstance(form, Encoder):
        return embed(model, batch)
    last = [len(row) - 1 for row in rows]
    places = [feature["mask"] for feature in encoded] if isinstance(form, Masked) else last
    states = unwrap(model).base_model(**batch).last_hidden_state
    return states[torch.arange(len(rows)), torch.tensor(places)]


def _prompt(form: Form, example: Example) -> list[int]:
    """Return the tokens that a candidate would follow."""
    text = fill(form.task.prompt, example.fields).strip()
    (tokens,) = tokenize(form.tokenizer, [text], [len(text) - 1], [len(text)])
    tokens = form._fit(tokens, example)
    return list(tokens.ids[: tokens.last])


def fit_probe(features: np.ndarray, labels: Sequence[int], *, bias: bool = True) -> LinearProbe:
    """Fit a multinomial logistic regression, with regularisation chosen by cross-validation.

    As in the published code, ten strengths from 1e-4 to 1e4 are tried (scikit-learn's
    LogisticRegressionCV) over five folds, or fewer if a label has fewer examples. If a label has a
    single example, the strength is 1. Raises InputError without scikit-learn or with one label.
    """
    try:
        from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
        from sklearn.model_selection import StratifiedKFold
    except ImportError:
        raise InputError("method lp needs scikit-learn: pip install 'mezo-lm[lp]'") from None
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    if len(counts) < 2:
        raise InputError("a linear probe needs training examples of two labels or more")
    shared: dict[str, Any] = {"max_iter": 5000, "tol": 1e-4, "fit_intercept": bias}
    folds = min(FOLDS, int(counts.min()))
    if folds < 2:
        fitted = LogisticRegression(**shared).fit(features, labels)
    else:
        rule = LogisticRegressionCV(
            Cs=10,
            cv=StratifiedKFold(folds),
            random_state=0,
            scoring="accuracy",
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
            **shared,
        )
        fitted = rule.fit(features, labels)
    weight, intercept = fitted.coef_, np.broadcast_to(fitted.intercept_, len(fitted.coef_))
    if len(weight) == 1:  # two labels: their difference
        weight = np.concatenate([-weight / 2, weight / 2])
        intercept = np.concatenate([-intercept / 2, intercept / 2])
    labels_seen = tuple(int(label) for label in fitted.classes_)
    return LinearProbe(np.ascontiguousarray(weight), np.ascontiguousarray(intercept), labels_seen)


def linear_probe(
    model: torch.nn.Module,
    form: Form,
    splits: dict[str, list[Example]],
    batch_size: int,
    output_dir: str,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Fit a probe on the training examples and save it; return the fields of a run's result."""
    head = unwrap(model).get_output_embeddings()
    bias = head is None or getattr(head, "bias", None) is not None  # the head's own form
    train = splits["train"]
    probe = fit_probe(
        features_of(model, form, train, batch_size, progress),
        [e.label for e in train],
        bias=bias,
    )
    found = {}
    for name in ("dev", "test"):
        features = features_of(model, form, splits[name], batch_size, progress)
        found[name] = probe.evaluate(features, splits[name], form.task)
    return {
        "test": found["test"],
        "dev": found["dev"].value,
        "forward_passes": -(-len(train) // batch_size),
        "stored_bytes": probe.save(output_dir),
    }


def zero_shot(
    model: torch.nn.Module,
    form: Form,
    splits: dict[str, list[Example]],
    batch_size: int,
    output_dir: str,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Return the fields of a run's result for the model as it is, without training."""
    found = {
        name: evaluate_form(model, form, splits[name], batch_size, progress=progress)
        for name in ("dev", "test")
    }
    return {
        "test": found["test"],
        "dev": found["dev"].value,
        "forward_passes": 0,
        "stored_bytes": 0,
    }
