"""What the training commands share: output of one process, interrupts, and the next command."""

import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from mezo.cli.parsing import Parser, say


def carried_out(
    words: list[str], args: Any, work: Callable[[Callable[[str], None]], dict[str, Any]]
) -> dict[str, Any] | None:
    """Run `work` and return its result; only the first of several processes prints and returns it.

    After an interrupt, the command `words` is printed with the option that resumes the run. `work`
    takes a function that prints a line for the user. Every process leaves the process group at the
    end.
    """
    from mezo.distributed.processes import leave

    talks = args.process_index == 0
    args.disable_tqdm = args.disable_tqdm or not sys.stderr.isatty()
    try:
        with redirect_stdout(sys.stderr):  # the Trainer and reward functions print
            result = work(say if talks else (lambda line: None))
    except KeyboardInterrupt:
        if talks:
            parser = Parser(prog="mezo", add_help=False, allow_abbrev=False)
            parser.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint")
            _, rest = parser.parse_known_args(words)
            again = shlex.join([*rest, "--resume_from_checkpoint", "true"])
            say(f"\nto go on where it stopped:\n  {again}")
        raise
    finally:
        leave()
    return result if talks else None


def replay(model: Any, args: Any, until: int | None = None) -> list[str]:
    """Return the words of the command that rebuilds the run's weights from its log."""
    words = ["mezo", "replay", "--model", model.model_name_or_path]
    words += ["--log", f"{args.output_dir}/run.mezo", "--output_dir", "replayed"]
    words += [] if args.offload_write_every else ["--by_tensor"]  # no weights were written
    return words + ([] if until is None else ["--until", str(until)])
