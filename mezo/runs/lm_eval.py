"""Evaluate a tuned or replayed model with lm-evaluation-harness: `mezo eval --tasks arc_easy,...`.

    pip install 'mezo-lm[lm-eval]'

The harness has its own prompts, data and metrics, and is given the model in memory. It also reads
your own task files (`include_path`), which may run code: a `!function` in one of them is executed.
`mezo train --task FILE.yaml` reads the same fields and executes nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.runs.rebuild import rebuilt
from mezo.trainers.placement import place


def evaluate(
    model_args: ModelArguments,
    names: Sequence[str],
    *,
    log: str | None = None,
    until: int | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Return {"model", "log", "results": {task: {metric: value}}, "n": {task: examples}}.

    Args:
        model_args: The model, or the base model of `log`.
        names: Tasks of the harness or of files under `include_path`.
        log: Run log to replay first; None evaluates the model as it is.
        until: Replay only the first steps of the run, up to this one.
        include_path: Folder with your own task files.
        limit: Use only the first `limit` examples of each task, to try things out.
        num_fewshot: Number of demonstrations; None uses each task's own number.
        batch_size: Examples per forward pass.

    Raises InputError if the harness is not installed, a task is unknown, or the model is not
    causal.
    """
    lm_eval, hflm, manager = _engine(names, include_path)
    if log is None:
        if until is not None:
            raise InputError("until is for the run log that --replay names")
        model, tokenizer = models.load(model_args)
    else:
        model, tokenizer, _ = rebuilt(model_args, log, until)
    if models.kind_of(model.config.architectures) != "causal":
        raise InputError(
            f"model {model_args.model_name_or_path} is not causal, as the harness requires"
        )
    place(model)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))  # the caller's
    try:
        found = lm_eval.simple_evaluate(
            model=hflm(model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=0,
            **seeds,
        )
    except (OSError, ValueError, ConnectionError, KeyError) as error:  # its data, offline; a task
        words = " ".join(str(error).splitlines()[:2])
        raise InputError(f"lm-evaluation-harness, {','.join(names)}: {words}") from error
    assert found is not None  # on the main process, and there is one
    results = {name: _numbers(row) for name, row in found["results"].items()}
    counts = {name: row["effective"] for name, row in found.get("n-samples", {}).items()}
    model_name = model_args.model_name_or_path
    return {"model": model_name, "log": log, "results": results, "n": counts}


def _engine(names: Sequence[str], include_path: str | None) -> tuple[Any, Any, Any]:
    """Return lm_eval, its class for a model in memory, and its tasks.

    Raises InputError if it is not installed or a task is unknown.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError(
            "--tasks needs lm-evaluation-harness: pip install 'mezo-lm[lm-eval]'"
        ) from None
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"include_path {include_path} is not a folder")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # reading the harness's own takes a while
        manager = TaskManager(include_path=include_path)
    _check(names, set(manager.all_tasks))
    return lm_eval, HFLM, manager


def _check(names: Sequence[str], known: set[str]) -> None:
    from difflib import get_close_matches

    if not names:
        raise InputError("--tasks: no task is named")
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "lm_eval ls tasks lists them"
            raise InputError(f"lm-evaluation-harness has no task {name!r}; {hint}")


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return metrics by name: "acc,none" becomes "acc"; other filters stay in the name."""
    metrics = {}
    for name, value in row.items():
        if (
            isinstance(value, int | float)
            and "_stderr" not in name
            and name not in ("alias", "sample_len")
        ):
            metrics[name.removesuffix(",none")] = float(value)
    return metrics
