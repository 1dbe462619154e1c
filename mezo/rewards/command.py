"""A program as a reward function: one line of JSON in, one line out, a sample at a time.

    in   {"prompt": ..., "completion": ..., and the data set's columns}
    out  0.5    or null, to leave the sample out    or {"reward": 0.5}

    for line in sys.stdin:                                    # score.py
        print(json.dumps(len(json.loads(line)["completion"])), flush=True)

The program is started once and stays; it is run without a shell, and reads text as data. What it
writes to stderr is kept for the report of a crash. A sample at which it crashes, or takes longer
than the time limit, has no reward; the program is started anew for the next one.
"""

import contextlib
import json
import logging
import os
import queue
import shlex
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import IO, Any

from mezo.errors import InputError
from mezo.rewards.text import content

_HOPELESS = 3  # samples lost without a single answer before it


class Command:
    """A reward function that asks a program. InputError if there is no such program.

    Args:
        command: the program and its arguments: a string is split as a shell would, without one.
        timeout: seconds for an answer; the first one after a start has ten times as long.
    """

    def __init__(self, command: str | Sequence[str], timeout: float = 10.0):
        try:
            words = shlex.split(command) if isinstance(command, str) else list(command)
        except ValueError as error:
            raise InputError(f"reward command {command!r}: {error}") from None
        if not words:
            raise InputError("the reward command is empty")
        if not timeout > 0:
            raise InputError(f"the time limit of a reward must be positive, got {timeout}")
        self.words, self.timeout, self.failures = words, timeout, 0
        self.__name__ = shlex.join(words)
        self._answers = 0
        self._process: _Process | None = None
        self._finalizer: weakref.finalize | None = None

    def __call__(self, prompts, completions, **given) -> list[float | None]:
        """One number a completion; None for those it lost."""
        passed = ("completion_ids", "trainer_state", "log_extra", "log_metric")
        columns = {name: values for name, values in given.items() if name not in passed}
        rewards, reasons = [], []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: values[i] for name, values in columns.items()}
            row |= {"prompt": prompt, "completion": content(completion)}
            try:
                rewards.append(self._reward(self._ask(json.dumps(row, default=str))))
            except _Lost as lost:
                rewards.append(None)
                reasons.append(str(lost))
        if reasons:
            logging.getLogger("mezo").warning(
                "reward command %s lost %d of %d samples (%d so far): %s",
                *(self.__name__, len(reasons), len(rewards), self.failures, reasons[-1]),
            )
        return rewards

    def close(self) -> None:
        """End the program; the next call starts it again."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None

    def _ask(self, line: str) -> str:
        process = self._process
        fresh = process is None
        if process is None:
            process = self._process = _Process(self.words)
            self._finalizer = weakref.finalize(self, process.end)
        try:
            answer = process.ask(line, self.timeout * (10 if fresh else 1))
        except _Lost as lost:
            self.close()
            self.failures += 1
            if not self._answers and self.failures >= _HOPELESS:
                raise InputError(
                    f"reward command {self.__name__} has not answered once: {lost}"
                ) from None
            raise
        except _Chatter as chatter:
            raise InputError(
                f"reward command {self.__name__} wrote {str(chatter)!r} beside its answer: one "
                "line a sample; what else it has to say goes to stderr"
            ) from None
        self._answers += 1
        return answer

    def _reward(self, line: str) -> Any:
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(
                f"reward command {self.__name__} answered {line!r}: write a number, null or "
                '{"reward": number}'
            ) from None
        if isinstance(answer, dict) and "reward" in answer:
            return answer["reward"]
        return answer  # checked with the others' rewards


class _Lost(Exception):
    """The program gave no answer; why."""


class _Chatter(Exception):
    """A line that nobody asked for."""


class _Process:
    """A running program, and a thread that reads its lines."""

    def __init__(self, words: list[str]):
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # a print is an answer
        try:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                env=environment,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            self.stderr.close()
            raise InputError(f"reward command {shlex.join(words)}: {error.strerror}") from None
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        args = (self.process.stdout, self.lines)
        threading.Thread(target=_read, args=args, daemon=True).start()

    def ask(self, line: str, timeout: float) -> str:
        if not self.lines.empty() and (early := self.lines.get()):
            raise _Chatter(early.strip())
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.lines.get(timeout=timeout)
        except queue.Empty:
            raise _Lost(f"no line within {timeout:g} s (is its output flushed?)") from None
        except OSError:  # a broken pipe
            answer = ""
        if not answer:  # the end of its output
            raise _Lost(self._last_words())
        return answer.strip()

    def _last_words(self) -> str:
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        self.stderr.seek(0)
        lines = self.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f"it ended with code {code}" + (f": {lines[-1]}" if lines else "")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):  # what was not written yet has no reader
                self.process.stdin.close()
        self.stderr.close()


def _read(file: IO[str], lines: "queue.SimpleQueue[str]") -> None:
    with file:
        for line in file:
            lines.put(line)
    lines.put("")
