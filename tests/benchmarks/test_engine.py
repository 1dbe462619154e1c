"""The timer of the engines' benchmarks."""

from types import SimpleNamespace

from benchmarks import engine


def test_calls_take_turns_and_a_first_round_does_not_count(monkeypatch):
    """A call that compiles on its first turn is not told as slow, and neither is its neighbour."""
    now, order = [0.0], []
    clocks = {"perf_counter": lambda: now[0], "process_time": lambda: now[0] / 4}
    monkeypatch.setattr(engine, "time", SimpleNamespace(**clocks))

    def call(name, *durations):
        taken = iter(durations)

        def runs():
            order.append(name)
            now[0] += next(taken)

        return runs

    found = engine.times({"a": call("a", 100, 4, 8, 40), "b": call("b", 1, 1, 2, 1)}, 3)
    assert order == ["a", "b"] * 4
    assert found == {"a": engine.Taken(8, 2), "b": engine.Taken(1, 0.25)}
