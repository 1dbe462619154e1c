"""A running program that answers lines of text, with limits on its time and its output.

The program leads its own process group, so that ending it ends everything it has started, and a
Ctrl-C in the terminal does not reach it. Three threads write to it and read from it, so that the
time limit of an answer also covers a program that does not read its input.
"""

import contextlib
import os
import queue
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import IO

from mezo.errors import InputError

MAX_LINE = 2**20  # most bytes of an answer
MAX_WORDS = 2**12  # bytes kept of the program's last output to stderr
_ENDED = b""


class Lost(Exception):
    """Raised if the program gives no answer; the message says why."""


class Chatter(Exception):
    """Raised if the program writes a line without being asked; the message quotes it."""

    def __init__(self, line: bytes, answer: bytes | None = None):
        """`answer` is the line that came with it and before it, where one did."""
        told = "its answer" if answer is None else f"its answer {_text(answer)!r:.200}"
        super().__init__(f"{_text(line)!r:.200} beside {told}")


class Program:
    """A started program. Raises InputError if it cannot be started."""

    def __init__(self, words: Sequence[str]):
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # a print is an answer
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                list(words),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=environment,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a null character in an argument
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"reward command {shlex.join(words)}: {reason}") from None
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._questions: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._last_words = bytearray()
        streams = self._process.stdin, self._process.stdout, self._process.stderr
        works = self._write, self._read, self._listen
        threads = [
            threading.Thread(target=work, args=(stream,), daemon=True)
            for work, stream in zip(works, streams, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._listener = threads[-1]

    def ask(self, line: str, timeout: float) -> str:
        """Send a line and return the one that answers it.

        Args:
            line: One line of text, without the line break.
            timeout: Seconds for sending the line and receiving the answer.

        Raises Lost or Chatter. After these and any other exception, such as KeyboardInterrupt, the
        program must be ended; otherwise a late answer would be taken for that of the next line.
        """
        if not self._answers.empty() and (early := self._answers.get()):
            raise Chatter(early.split(b"\n")[0])
        self._questions.put(line.encode("utf-8", "replace") + b"\n")
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise Lost(f"no line within {timeout:g} s (is its output flushed?)") from None
        if answer == _ENDED:
            raise Lost(self._reason())
        answer, _, beside = answer.partition(b"\n")
        if beside:
            raise Chatter(beside, answer)
        if len(answer) > MAX_LINE:
            raise Lost(f"a line of more than {MAX_LINE:,} bytes")
        return _text(answer)

    def settle(self, seconds: float) -> None:
        """Wait that long for a line that nobody has asked for, and raise Chatter if one comes.

        After a line too many, every question has the answer of the one before, and the last one's
        answer is still to come.
        """
        with contextlib.suppress(queue.Empty):
            line = self._answers.get(timeout=seconds)
            if line != _ENDED:
                raise Chatter(line.split(b"\n")[0])
            self._answers.put(line)  # the next question is told

    def end(self) -> None:
        """Kill the program and every process of its group."""
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._questions.put(_ENDED)

    def _reason(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        self._listener.join(
            timeout=1.0
        )  # what it said last; a process that it left may hold stderr
        lines = self._last_words.decode("utf-8", "replace").strip().splitlines()
        return f"it ended with code {code}" + (f": {lines[-1]}" if lines else "")

    # one thread each

    def _write(self, stdin: IO[bytes]) -> None:
        with contextlib.suppress(OSError), stdin:  # a broken pipe: the reader reports the end
            while question := self._questions.get():
                rest = memoryview(question)
                while rest:
                    rest = rest[stdin.write(rest) :]

    def _read(self, stdout: IO[bytes]) -> None:
        """Pass on lines. A line too many stops the reading, so that the program blocks or ends."""
        line = b""
        with stdout:
            while self._answers.qsize() < 2 and len(line) <= MAX_LINE:
                piece = stdout.read(2**16)
                if not piece:
                    break
                *whole, line = (line + piece).split(b"\n")
                if whole:  # what came with the first line is told with it, an unfinished line too
                    beside = whole[1] + b"\n" if len(whole) > 1 else line
                    self._answers.put(whole[0] + b"\n" + beside)
        if line:
            self._answers.put(line)
        self._answers.put(_ENDED)

    def _listen(self, stderr: IO[bytes]) -> None:
        with stderr:
            while piece := stderr.read(2**16):
                self._last_words += piece
                del self._last_words[:-MAX_WORDS]


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").strip()
