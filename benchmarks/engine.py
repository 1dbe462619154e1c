"""A step of MeZO whose weights are in vLLM: how much of it is scoring, and samples a second.

    python -m benchmarks.engine --shape 1.3b --dtype bfloat16 --size 16x50

Weights are random, of OPT's shapes. The aim on an H200, 1.3B, 16 x 50: at least 85 % of a step in
scoring, and no step slower than the graph path of `python -m benchmarks.step`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from benchmarks import step
from mezo import Generation, MeZO
from mezo.engines import THETA, attach
from mezo.engines.engine import token_batch
from mezo.engines.vllm_engine import VLLMEngine, check_version
from mezo.models import loading as models


def measure(shape: str, dtype: str, batch: int, tokens: int, repeats: int = 5) -> dict:
    """Seconds of a scoring pass, of a step and of writing, for one size of batch."""
    version = check_version()
    model = step.build(shape, "cpu", getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(models.causal_lm()).save_pretrained(folder)
        options = {"max_model_len": 2 * tokens + 8, "max_num_seqs": max(batch, 16)}
        engine = VLLMEngine(folder, dtype=dtype, gpu_memory_utilization=0.4, **options)
        try:
            found = _of_engine(engine, model, batch, tokens, repeats)
        finally:
            engine.close()
    return {"vllm": version, "shape": shape, "dtype": dtype, "size": f"{batch}x{tokens}"} | found


def _of_engine(engine: VLLMEngine, model, batch: int, tokens: int, repeats: int) -> dict:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (batch, tokens), generator=draw).tolist()
    asked = token_batch((row, tokens - 4) for row in ids)  # the last tokens, as a task's answers
    optimizer = MeZO(model.named_parameters(), lr=1e-9, seed=0, distribution="gaussian16")
    remote = attach(optimizer, engine)
    settings = Generation(max_new_tokens=tokens, temperature=1.0)

    def one_step() -> None:
        optimizer.step(lambda: remote.loss(asked))
        remote.flush()

    calls = {
        "scorings": lambda: engine.losses(asked, [THETA, THETA]),
        "step": one_step,
        "texts": lambda: engine.texts(ids, [THETA], settings),
    }
    taken = {name: one.seconds for name, one in times(calls, repeats).items()}
    found = {"seconds_of_two_scorings": taken["scorings"], "seconds_of_a_step": taken["step"]}
    found |= {"share": taken["scorings"] / taken["step"], "perturbation": optimizer.perturbation}
    return found | {"samples_per_second": batch / taken["texts"]}


class Taken(NamedTuple):
    """What a call takes, as medians."""

    seconds: float
    cpu_seconds: float  # of this process's threads together; a busy machine changes it little


def times(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Taken]:
    """Time calls in turns, so that what else the machine does meets all of them alike.

    A first round does not count.
    """
    found: dict[str, list[Taken]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began, busy = time.perf_counter(), time.process_time()
            call()
            if turn:
                taken = Taken(time.perf_counter() - began, time.process_time() - busy)
                found[name].append(taken)
    return {
        name: Taken(*map(statistics.median, zip(*taken, strict=True)))
        for name, taken in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1.3b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", default="16x50")
    args = parser.parse_args()
    batch, tokens = map(int, args.size.split("x"))
    print(json.dumps(measure(args.shape, args.dtype, batch, tokens)))


if __name__ == "__main__":
    main()
