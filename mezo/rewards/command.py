"""A program as a reward function: for each sample it reads one line of JSON and writes one line.

    in   {"prompt": ..., "completion": ..., "sample": 7, and the data set's columns}
    out  0.5    or null, to leave the sample out    or {"reward": 0.5, "sample": 7}

    for line in sys.stdin:                                    # score.py
        print(json.dumps(len(json.loads(line)["completion"])), flush=True)

The program is started once, without a shell, and keeps running; it reads text as data. The last
lines that it writes to stderr are kept for the report of a crash. If it crashes or exceeds the time
limit, the sample has no reward, and the program is restarted for the next one. It is also restarted
after an interrupted call, so that a late answer cannot be taken for that of another sample.

An answer that repeats the number `sample` is checked against it; once one has, every reward must.
Without the number, a line too many may be taken for the answer to the next sample. After the last
sample of a call, the program is therefore given time for a line that nobody has asked for: the
rewards of the call are refused if there is one.
"""

import json
import logging
import shlex
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from mezo.errors import InputError
from mezo.rewards.program import Chatter, Lost, Program
from mezo.rewards.text import content

_QUIET = 0.01  # seconds at least without a line that nobody has asked for, at the end of a call
_HOPELESS = 3  # samples lost without a single answer before the run is stopped


class Command:
    """A reward function that asks a program.

    Args:
        command: the program and its arguments. A string is split as a shell would split it, but no
            shell is involved.
        timeout: seconds for sending a sample and receiving its answer. The first one after a start
            has ten times as long.

    Raises InputError for a program that cannot be started, that has never answered, or whose answer
    is not a reward.
    """

    def __init__(self, command: str | Sequence[str], timeout: float = 10.0):
        try:
            words = shlex.split(command) if isinstance(command, str) else list(command)
        except ValueError as error:
            raise InputError(f"reward command {command!r}: {error}") from None
        if not words:
            raise InputError("the reward command is empty")
        if not 0 < timeout <= threading.TIMEOUT_MAX / 10:
            raise InputError(f"the time limit of a reward must be positive, got {timeout}")
        self.words, self.timeout, self.failures = words, timeout, 0
        self.__name__ = shlex.join(words)
        self._asked = self._answers = 0
        self._numbered = False  # whether answers repeat the number of their sample
        self._longest = 0.0  # seconds that an answer of this call has taken
        self._program: Program | None = None
        self._finalizer: weakref.finalize | None = None

    def __call__(self, prompts, completions, **columns) -> list[float | None]:
        """Return one reward per completion, and None for a sample that was lost or left out."""
        passed = ("completion_ids", "trainer_state", "log_extra", "log_metric")
        columns = {name: values for name, values in columns.items() if name not in passed}
        rewards, reasons, self._longest = [], [], 0.0
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            self._asked += 1
            row = {"sample": self._asked} | {name: values[i] for name, values in columns.items()}
            row |= {"prompt": prompt, "completion": content(completion)}
            try:
                rewards.append(self._reward(self._ask(json.dumps(row, default=str)), row["sample"]))
            except Lost as lost:
                rewards.append(None)
                reasons.append(str(lost))
        self._settle()
        if reasons:
            logging.getLogger("mezo").warning(
                "reward command %s lost %d of %d samples (%d so far): %s",
                *(self.__name__, len(reasons), len(rewards), self.failures, reasons[-1]),
            )
        return rewards

    def close(self) -> None:
        """End the program. The next call starts it again."""
        if self._finalizer is not None:
            self._finalizer()
        self._program = None

    def _ask(self, line: str) -> str:
        program = self._program
        fresh = program is None
        if program is None:
            program = self._program = Program(self.words)
            self._finalizer = weakref.finalize(self, program.end)
        began = time.monotonic()
        try:
            answer = program.ask(line, self.timeout * (10 if fresh else 1))
            self._longest = max(self._longest, time.monotonic() - began)
        except Lost as lost:
            self.close()
            self.failures += 1
            if not self._answers and self.failures >= _HOPELESS:
                raise InputError(
                    f"reward command {self.__name__} has not answered once: {lost}"
                ) from None
            raise
        except Chatter as chatter:
            raise self._refused(chatter) from None
        except BaseException:  # Ctrl-C: the answer that is due must not meet the next sample
            self.close()
            raise
        self._answers += 1
        return answer

    def _settle(self) -> None:
        """Raise InputError for a line too many, so that no reward of this call is used.

        Waits twice as long as the longest answer of the call has taken.
        """
        if self._program is None or self._numbered:
            return
        try:
            self._program.settle(min(self.timeout, max(_QUIET, 2 * self._longest)))
        except Chatter as chatter:
            raise self._refused(chatter) from None
        except BaseException:
            self.close()
            raise

    def _refused(self, chatter: Chatter) -> InputError:
        self.close()
        return InputError(
            f"reward command {self.__name__} wrote {chatter}: it "
            "must write one line for each sample, and anything else to stderr"
        )

    def _reward(self, line: str, sample: Any) -> Any:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(
                f"reward command {self.__name__} answered {line!r:.200}: it must write a number, "
                'null or {"reward": number}'
            ) from None
        rewarded = isinstance(answer, dict) and "reward" in answer
        if (rewarded and "sample" in answer) or (self._numbered and answer is not None):
            self._check_number(answer, sample)
        return answer["reward"] if rewarded else answer  # checked with the other functions' rewards

    def _check_number(self, answer: Any, sample: int) -> None:
        """Raise InputError for the answer to another sample, or for one without the number."""
        self._numbered = True
        if isinstance(answer, dict) and "sample" in answer:
            if answer["sample"] == sample:
                return
            what = f"for sample {answer['sample']!r:.80} when it was asked for {sample}"
        else:
            what = f"{str(answer)!r:.200} without the sample's number, which others have had"
        self.close()
        raise InputError(f"reward command {self.__name__} answered {what}")
