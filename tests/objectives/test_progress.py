"""Lines about how far a loop is: when they come, and what they say, by a clock of the tests."""

import pytest

from mezo.objectives.progress import Progress, span


class Clock:
    """Moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def told(rounds, total, seconds, losses=None, done=0):
    """The lines of a loop whose rounds take `seconds` each, with the times at which they came."""
    clock, lines = Clock(), []
    loop = Progress(lambda line: lines.append((clock.now - 100, line)), clock).of(
        "step", total, done
    )
    for i in range(rounds):
        clock.now += seconds
        loop.at(done + i + 1, None if losses is None else losses[i])
    loop.end()
    return lines


def test_the_first_line_comes_after_ten_seconds_and_then_one_every_half_minute():
    """Without a terminal a run of MeZO said nothing for minutes."""
    assert [at for at, _ in told(100, 100, 1.0)] == [10, 40, 70, 100]


def test_a_line_has_the_loss_since_the_last_one_the_speed_and_the_time_left():
    """What is asked of a log is whether it learns, and when it will be over."""
    lines = told(40, 20_000, 1.0, losses=[0.5] * 10 + [0.25] * 30)
    assert lines[0][1] == "step 10/20000, loss 0.5, 1.0/s, 5 h 33 min left"
    assert lines[1][1] == "step 40/20000, loss 0.25, 1.0/s, 5 h 33 min left"


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean():
    """A step that was refused has no loss; the mean of the others is still one."""
    (line,) = told(2, 2, 10.0, losses=[float("nan"), 0.5])[1:]
    assert line[1] == "step 2/2, loss 0.5, 10.0 s each, 20 s in all"


def test_a_run_that_went_on_does_not_count_the_steps_of_before_as_its_own_speed():
    """900 of 1,000 steps lay in the log: at 10 s a step, 96 are left."""
    lines = [line for _, line in told(4, 1000, 10.0, done=900)]
    assert lines[0] == "step 901/1000, 10.0 s for the first"  # which compiles: no measure of all
    assert lines[1] == "step 904/1000, 10.0 s each, 16 min left"


def test_the_end_is_told_once():
    """A short run says where it ended; a line that says so already is not repeated."""
    assert [line for _, line in told(3, 3, 1.0)] == ["step 3/3, 1.0/s, 3 s in all"]
    assert len(told(1, 1, 10.0)) == 1
    assert told(0, 3, 1.0) == []


def test_batches_that_are_soon_over_say_nothing():
    """An evaluation of a second needs no line; one of a minute does."""

    def lines_of(seconds):
        clock, lines = Clock(), []
        for _ in Progress(lines.append, clock).over(range(10), "batch"):
            clock.now += seconds
        return lines

    assert lines_of(0.9) == []
    first, second = lines_of(6.0)
    assert first == "batch 2/10, 6.0 s each, 48 s left"
    assert second == "batch 7/10, 6.0 s each, 18 s left"


def test_a_loop_that_others_count_is_told_too():
    """A replay knows the number of its tensors once it has read them."""
    clock, lines = Clock(), []
    counted = Progress(lines.append, clock).counted("tensor")
    for done in (1, 2, 3):
        clock.now += 6.0
        counted(done, 3)
    assert lines == ["tensor 2/3, 6.0 s each, 6 s left"]


def test_without_anybody_to_tell_the_items_are_the_same():
    """It stands in the way of every evaluation: it must be nothing there."""
    assert list(Progress().over([3, 1, 2], "batch")) == [3, 1, 2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "1 h 40 min"), (3 * 86400, "3 d 0 h")],
)
def test_a_time_is_read_at_a_glance(seconds, text):
    """Seconds, minutes or hours, whichever has few digits."""
    assert span(seconds) == text
