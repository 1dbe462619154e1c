"""Candidates scored in batches, with one prompt for all of an example, against one at a time.

    python -m benchmarks.evaluate --data_dir SST-2 --model causal-lm --output evaluate.json

On the dev examples of SST-2, in their order, with the paper's words as candidates, one token each,
and with longer ones. Methods take turns in one process; a figure is the median of its turns, a
ratio the median over turns of the ratio to `one at a time` within a turn.

    one at a time   a forward pass for each candidate of each example, batch 1, all logits
    apart           batches, a row for each candidate, logits where they are read
    shared          batches, a row for each example
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mezo import tasks
from mezo.evaluation.evaluate import score
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.modes import evaluating
from mezo.objectives import Form, form_for
from mezo.runs.result import environment

FIRST = "one at a time"
LONG = (" a terrible, awful, boring movie", " a great, wonderful, enjoyable movie")


def one_at_a_time(model, form: Form, examples: list[tasks.Example]) -> torch.Tensor:
    """(examples, candidates): the mean log-probability a token, as the paper's code has it."""
    tokenizer, task, scores = form.tokenizer, form.task, []
    with evaluating(model):
        for example in examples:
            prompt = tasks.fill(task.prompt, example.fields).lstrip()
            start = len(tokenizer(prompt).input_ids)
            for candidate in task.candidates:
                ids = tokenizer(prompt + candidate, return_tensors="pt").input_ids.to(model.device)
                log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
                chosen = log_probs.gather(1, ids[0, 1:, None])
                scores.append(float(chosen[start - 1 :].mean()))
    return torch.tensor(scores).view(len(examples), -1)


def measure(model, tokenizer, task, examples, batch_size: int, repeats: int) -> dict:
    forms = {"shared": form_for(model, tokenizer, task, truncate=True)}
    if forms["shared"].branches():  # else all candidates of an example have the same row
        forms["apart"] = form_for(model, tokenizer, task, truncate=True, share=False)

    def batched(form: Form) -> torch.Tensor:
        return score(model, form, [form.encode(example) for example in examples], batch_size)

    calls: dict[str, Callable[[], torch.Tensor]] = {
        FIRST: lambda: one_at_a_time(model, forms["shared"], examples)
    }
    calls |= {name: partial(batched, form) for name, form in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    found = {}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            found[name] = call()
            if turn:  # the first one takes the memory
                seconds[name].append(time.perf_counter() - began)
    rows = {
        name: {
            "seconds": statistics.median(values),
            "times_faster": statistics.median(
                a / b for a, b in zip(seconds[FIRST], values, strict=True)
            ),
            "largest_difference": float((found[name] - found[FIRST]).abs().max()),
        }
        for name, values in seconds.items()
    }
    return {"candidates": task.candidates, "batch_size": batch_size, "methods": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder with SST-2's dev.tsv")
    parser.add_argument("--model", default="causal-lm")
    parser.add_argument("--examples", type=int, default=872, help="the first so many")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, tokenizer = models.load(ModelArguments(args.model))
    model.to(args.device)
    sst2 = tasks.get("sst2")
    examples = tasks.load_examples(sst2, "dev", data_dir=args.data_dir)[: args.examples]
    found = []
    for candidates in (sst2.candidates, LONG):
        task = replace(sst2, candidates=candidates)
        found.append(measure(model, tokenizer, task, examples, args.batch_size, args.repeats))
        print(f"{args.model}, {len(examples)} examples, candidates {' /'.join(candidates)}")
        for name, row in found[-1]["methods"].items():
            print(f"  {name:16} {row['seconds']:8.2f} s  {row['times_faster']:6.1f} times faster")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"model": args.model, "examples": len(examples), "repeats": args.repeats}
        result |= {"device": args.device, "rows": found, "environment": environment()}
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
