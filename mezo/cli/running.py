"""What the commands that train share: who talks, what an interrupt says, which command is next."""

import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from mezo.cli.parsing import say


def carried_out(
    words: list[str], args: Any, work: Callable[[Callable[[str], None]], dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the result of a run; None in all but the first of several processes, which talks.

    `words` are the command, to be said again after an interrupt; `work` makes the run and is given
    what takes lines for the user. Of several processes each leaves the group in the end.
    """
    from mezo.distributed.processes import leave

    talks = args.process_index == 0
    args.disable_tqdm = args.disable_tqdm or not sys.stderr.isatty()
    try:
        with redirect_stdout(sys.stderr):  # the Trainer prints its logs, a reward function its own
            result = work(say if talks else (lambda line: None))
    except KeyboardInterrupt:
        if talks:
            again = shlex.join([*words, "--resume_from_checkpoint", "true"])
            say(f"\nto go on where it stopped:\n  {again}")
        raise
    finally:
        leave()
    return result if talks else None


def replay(model: Any, args: Any, until: int | None = None) -> list[str]:
    """Return the words of the command that rebuilds the run's weights."""
    words = ["mezo", "replay", "--model", model.model_name_or_path]
    words += ["--log", f"{args.output_dir}/run.mezo", "--output_dir", "replayed"]
    words += [] if args.offload_write_every else ["--by_tensor"]  # there is no other model
    return words + ([] if until is None else ["--until", str(until)])
