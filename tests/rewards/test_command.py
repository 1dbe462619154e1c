"""A program as a reward function: its answers stay with their samples, whatever it does."""

import json
import os
import signal
import sys
import time

import pytest

from mezo.errors import InputError
from mezo.objectives.generation import Completion
from mezo.rewards import Command, RewardFunctions
from mezo.rewards.program import MAX_WORDS, Program

SCORE = """
import json, sys, time
for line in sys.stdin:
    row = json.loads(line)
    text = row["completion"]
    if text == "crash":
        sys.exit("no such text")
    if text == "hang":
        time.sleep(60)
    if text == "none":
        print("null")
    else:
        print(json.dumps({"reward": len(text) + row.get("bonus", 0)}))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "score it.py"
    path.write_text(SCORE)
    return [sys.executable, str(path)]


def ask(command, *texts, **columns):
    made = [Completion((), text, True) for text in texts]
    return RewardFunctions(command)(["p"] * len(texts), made, columns).total


def test_a_program_is_asked_line_by_line_and_started_once(program):
    command = Command(program)
    assert ask(command, "ab", "none", "x\ny", bonus=[1, 0, 2]) == [3.0, None, 5.0]
    process = command._program
    assert ask(command, "ab") == [2.0]
    assert command._program is process
    command.close()


def test_a_crash_costs_that_sample_and_is_reported(program, caplog):
    command = Command(program)
    assert ask(command, "ab", "crash", "abc") == [2.0, None, 3.0]
    assert "lost 1 of 3 samples (1 so far): it ended with code 1: no such text" in caplog.text
    command.close()


def test_a_sample_without_an_answer_in_time_is_lost(program, caplog, monkeypatch):
    """Only the text that never comes runs out of time here, however busy the machine is."""
    limits, in_time = [], Program.ask

    def impatient(program, line, limit):
        limits.append(limit)
        return in_time(program, line, 0.01 if '"hang"' in line else limit)

    monkeypatch.setattr(Program, "ask", impatient)
    command = Command(program, timeout=60)
    assert ask(command, "ab", "hang", "abc") == [2.0, None, 3.0]
    assert limits == [600, 60, 600]  # a program that has just been started has ten times as long
    assert "no line within 0.01 s" in caplog.text
    command.close()


def test_a_program_that_never_answers_ends_the_run_with_its_last_words():
    command = Command([sys.executable, "-c", "raise SystemExit('wrong version')"])
    with pytest.raises(InputError, match=r"has not answered once: .* wrong version"):
        ask(command, "a", "b", "c", "d")


def test_generated_text_reaches_no_shell(tmp_path):
    """The text is data, in the arguments' file and in the program's input alone."""
    mark = tmp_path / "mark"
    cat = [sys.executable, "-c", "import sys\nfor line in sys.stdin: print(1)", f"; touch {mark}"]
    command = Command(cat)
    assert ask(command, f"$(touch {mark}); `touch {mark}`") == [1.0]
    assert not mark.exists()
    command.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('good')", "answered 'good'"),
        ("print('NaN')", "returned nan for completion 0"),
        ("print('[1]')", "a list"),
    ],
)
def test_an_answer_that_is_no_number_names_the_command(code, words):
    command = Command([sys.executable, "-c", f"import sys\nfor line in sys.stdin: {code}"])
    with pytest.raises(InputError, match=words):
        ask(command, "a")
    command.close()


def test_a_program_that_says_more_than_its_answer_is_refused():
    code = "import sys\nfor line in sys.stdin: print('1\\n2')"
    command = Command([sys.executable, "-c", code])
    texts = ["a"] * 100  # the second line may be late
    with pytest.raises(InputError, match=r"wrote '[12]' beside its answer"):
        ask(command, *texts)
    command.close()


SHIFTING = """
import json, select, sys
for number, line in enumerate(sys.stdin):
    row = json.loads(line)
    answer = {"reward": len(row["completion"])}
    print(json.dumps(answer | ({"sample": row["sample"]} if NUMBERED else {})), flush=True)
    if number == 1:
        select.select([sys.stdin.buffer.raw], [], [])  # until the next sample has been sent
        print(99, flush=True)
"""


def test_a_line_too_many_that_comes_while_the_next_sample_waits_is_refused():
    """It is taken for that sample's answer; the call's last answer is then one too many."""
    command = Command([sys.executable, "-uc", SHIFTING.replace("NUMBERED", "False")])
    calls = (ask(command, "a", "bb", "ccc", "dddd") for _ in range(50))
    with pytest.raises(InputError, match=r"wrote '{\"reward\": \d}' beside its answer"):
        list(calls)  # the first one, but a busy machine may tell it in a later one only


def test_answers_with_the_number_of_their_sample_never_shift():
    """The number is what a program says; a line without it is nobody's answer.

    On a busy machine the next answer may come with that line: both are then told, and none is used.
    """
    command = Command([sys.executable, "-uc", SHIFTING.replace("NUMBERED", "True")])
    told = "answered '99' without the sample's number|beside its answer '99'"
    with pytest.raises(InputError, match=told):
        ask(command, "a", "bb", "ccc", "dddd")


def test_a_call_whose_answers_are_all_there_ends_without_a_line_too_many(program):
    """The wait at its end is short, and takes nothing from the next call."""
    command = Command(program)
    for _ in range(3):
        assert ask(command, "ab", "c") == [2.0, 1.0]
    assert ask(command, "crash") == [None]
    assert ask(command, "abc") == [3.0]
    command.close()


def test_commands_that_cannot_be_run_are_refused():
    with pytest.raises(InputError, match=r"no-such-program --x: No such file"):
        ask(Command("no-such-program --x"), "a")
    for text, words in (("", "is empty"), ("a 'b", "No closing quotation")):
        with pytest.raises(InputError, match=words):
            Command(text)
    with pytest.raises(InputError, match="must be positive, got 0"):
        Command("a", timeout=0)


LENGTHS = "import sys, json\nfor line in sys.stdin: print(len(json.loads(line)['completion']))"


def python(code):
    return [sys.executable, "-c", code]


def test_an_interrupted_call_shifts_no_reward():
    """Ctrl-C while an answer is due: it must not be taken for that of the next sample."""
    slow = "import sys, json, time\nfor line in sys.stdin:\n"
    slow += "    text = json.loads(line)['completion']\n"
    slow += "    if text == 'stop': import os, signal; os.kill(PARENT, signal.SIGINT)\n"
    slow += "    time.sleep(0.2 * (text == 'stop')); print(len(text))"
    command = Command(python(slow.replace("PARENT", str(os.getpid()))))
    assert command(["p"], ["x"]) == [1]

    def interrupted():
        command(["p"], ["stop"])
        time.sleep(60)  # the signal is sent before the answer, but may be handled late

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert command(["p"] * 3, ["x" * n for n in (20, 30, 40)]) == [20, 30, 40]
    command.close()


def test_an_answer_may_name_its_sample_and_is_then_checked():
    code = "import sys, json\nfor line in sys.stdin:\n    row = json.loads(line)\n"
    code += "    print(json.dumps({'reward': 1, 'sample': row['sample'] + row['off']}))"
    command = Command(python(code))
    assert command(["p"], ["x"], off=[0]) == [1]
    with pytest.raises(InputError, match="answered for sample 3 when it was asked for 2"):
        command(["p"], ["x"], off=[1])


def test_the_time_limit_covers_a_program_that_does_not_read():
    """A sample larger than a pipe is written only as it is read."""
    command = Command(python("import time; time.sleep(600)"), timeout=0.02)
    assert command(["x" * 10**6], ["y"]) == [None]
    command.close()


def test_all_that_a_program_has_started_ends_with_it(tmp_path, monkeypatch):
    """A shell script's own children would otherwise pile up, one for each time limit."""
    inner = tmp_path / "inner.py"
    pid, in_time = tmp_path / "pid", Program.ask
    inner.write_text(
        f"import os, time\nopen({str(tmp_path / 'part')!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'part')!r}, {str(pid)!r})\ntime.sleep(600)"
    )

    def ask_when_both_run(program, line, limit):
        while not pid.exists():
            time.sleep(0.01)
        return in_time(program, line, 0.01)

    monkeypatch.setattr(Program, "ask", ask_when_both_run)
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, {str(inner)!r}])"
    command = Command(python(code))
    assert command(["p"], ["c"]) == [None]
    child = int(pid.read_text())
    for _ in range(10_000):  # it dies, and init reaps it, when the machine comes to that
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if "Z" in _state(child):
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the program's child outlived it")


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_endless_output_takes_no_memory():
    """A line without an end is cut off, lines without an end are refused, stderr is its end."""
    line = Command(python("import sys\nwhile True: sys.stdout.write('x' * 2**16)"))
    assert line(["p"], ["c"]) == [None]
    line.close()
    lines = Command(python("import sys\nwhile True: sys.stdout.write('1\\n1\\n')"))
    with pytest.raises(InputError, match="wrote '1' beside its answer"):
        lines(["p"] * 100, ["c"] * 100)
    code = "import sys\nsys.stderr.write('x' * 2**22 + '\\nthe last words'); sys.exit(3)"
    loud = Command(python(code))
    with pytest.raises(InputError, match="ended with code 3: the last words"):
        loud(["p"] * 3, ["c"] * 3)
    program = Command(python("import sys\nsys.stderr.write('x' * 2**22)\n" + LENGTHS))
    assert program(["p"], ["four"]) == [4]
    assert len(program._program._last_words) <= MAX_WORDS
    program.close()


@pytest.mark.parametrize("answer", ["[" * 100_000, "1" * 5_000])
def test_json_that_the_reader_chokes_on_names_the_command(answer):
    """Deep nesting and numbers of thousands of digits raise other errors than broken JSON."""
    command = Command(python(f"input(); print({answer[0]!r} * {len(answer)})"))
    with pytest.raises(InputError, match="must write a number"):
        command(["p"], ["c"])
    command.close()


def test_what_was_sent_is_json(tmp_path):
    keep = f"open({str(tmp_path / 'in')!r}, 'w').write(line)"
    code = f"import sys\nfor line in sys.stdin: {keep}; print(0)"
    command = Command(python(code))
    command(["p"], ["c"], completion_ids=[[1]], label=["l"])
    command.close()
    sent = json.loads((tmp_path / "in").read_text())
    assert sent == {"sample": 1, "prompt": "p", "completion": "c", "label": "l"}
