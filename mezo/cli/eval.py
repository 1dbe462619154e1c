"""The command `mezo eval`: evaluate on a task of this package or of lm-evaluation-harness."""

import sys
from contextlib import redirect_stdout
from typing import Any

from mezo.cli import entries
from mezo.cli.entries import Entry, page
from mezo.cli.parsing import JSON, helped, options_of, print_result, say
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import DataArguments

HELP = page(
    Entry("--replay LOG", "Rebuild the weights of a run from its log first."),
    Entry("--until N", "Replay only the first N steps of the run."),
    Entry("--batch_size N", "Number of examples in a forward pass.", 32),
    Entry("--offload", "Leave the weights in their files, and load them block by block."),
    Entry("--engine NAME", "What scores and writes: transformers or vllm.", "transformers"),
    entries.ENGINE_OPTIONS,
    Entry("--tasks NAME,NAME", "Use tasks of lm-evaluation-harness instead of --task."),
    Entry("  --include_path DIR", "With --tasks: folder that holds task files of your own."),
    Entry("  --limit N", "With --tasks: number of examples of each task."),
    Entry("  --num_fewshot N", "With --tasks: number of demonstrations; each task has a default."),
    entries.JSON,
)
OWN: dict[str, Any] = {
    "replay": {},
    "until": {"type": int},
    "batch_size": {"type": int, "default": 32},
    "tasks": {},
    "include_path": {},
    "limit": {"type": int},
    "num_fewshot": {"type": int},
    "offload": {"action": "store_true"},
    "engine": {"default": "transformers"},
    "engine_options": {},
    "json": JSON,
}


def main(argv: list[str]) -> None:
    kinds = (ModelArguments, DataArguments)
    if helped("mezo eval", argv, kinds, HELP):
        return None
    from mezo.objectives.progress import Progress
    from mezo.runs import task as run

    model, data, own = options_of("mezo eval", argv, kinds, OWN)
    shared = {"log": own.replay, "until": own.until, "batch_size": own.batch_size}
    if own.tasks is None:
        for name in ("include_path", "limit", "num_fewshot"):
            if getattr(own, name) is not None:
                raise InputError(f"--{name} needs --tasks")
        shared |= {"engine": own.engine, "engine_options": own.engine_options}
        with redirect_stdout(sys.stderr):
            result = run.evaluate(
                *(model, data), **shared, offload=own.offload, progress=Progress(say)
            )
        return print_result(result, own.json)
    if own.offload:
        raise InputError("--offload cannot be used with --tasks")
    if own.engine != "transformers":
        raise InputError("--engine cannot be used with --tasks")
    from mezo.runs import lm_eval as harness

    names = [name.strip() for name in own.tasks.split(",") if name.strip()]
    shared |= {"include_path": own.include_path, "limit": own.limit}
    with redirect_stdout(sys.stderr):
        result = harness.evaluate(model, names, num_fewshot=own.num_fewshot, **shared)
    if own.json:
        return print_result(result, as_json=True)
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            print(f"{task}\t{name}\t{value:.4g}")
