"""How anything is timed: verified first, then in turn, on a clock that only work advances."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepfuse.bench import timing
from stepfuse.bench.samples import ratio
from stepfuse.bench.timing import LEAST_ROUNDS, Turns, Work, rounds, timer_for, wall


class Clock:
    """Tells the time that work and pauses have taken; ``log`` is what was done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 2 * self.now  # two threads are always at work

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.log.append("pause")

    def work(self, name: str, seconds: float = 1.0) -> Callable[..., None]:
        """A call that takes ``seconds`` and is logged by its name."""

        def call(*arguments: Any) -> None:
            self.now += seconds
            self.log.append(" ".join([name, *map(str, arguments)]))

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def works(clock: Clock, names: str = "abc") -> dict[str, Work]:
    """The first takes a second, the next two..."""
    return {name: Work(clock.work(name, n + 1.0)) for n, name in enumerate(names)}


def wrong() -> None:
    raise AssertionError("off by 3")


def refused() -> None:
    raise RuntimeError("no such primitive")


def test_candidates_take_turns_and_nobody_is_always_first(clock: Clock) -> None:
    turns = Turns(works(clock)).run(4)
    assert clock.log == list("abcbcacababc")
    assert turns.seconds == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}
    assert turns.cpu_seconds["c"] == [6.0] * 4


def test_one_that_is_wrong_is_never_timed_and_neither_are_the_others(clock: Clock) -> None:
    given = works(clock)
    given["b"].verify = wrong
    with pytest.raises(AssertionError, match="off by 3"):
        Turns(given)
    assert clock.log == []


def test_one_that_cannot_run_here_is_named_and_the_others_are_timed(clock: Clock) -> None:
    given, said = works(clock), []
    given["a"].verify = lambda: {"error": 1e-6}
    given["b"].verify = refused
    turns = Turns(given, say=said.append).run(2)
    assert clock.log == list("acca")
    assert said == ["b left out: RuntimeError: no such primitive"]
    assert turns.found == {"a": {"error": 1e-6}, "c": None}
    assert turns.seconds.keys() == turns.works.keys() == {"a", "c"}


def test_everything_is_verified_before_anything_is_run(clock: Clock) -> None:
    given = {
        name: Work(clock.work(name), functools.partial(clock.work("verify"), name), calls=None)
        for name in "ab"
    }
    Turns(given).run(1)
    assert clock.log[:3] == ["verify a", "verify b", "a"]


def test_ratios_are_formed_round_by_round(clock: Clock) -> None:
    """Every round is slower than the one before; ``b`` begins the second."""
    speed = iter([1.0, 1.0, 5.0, 10.0, 100.0, 300.0])

    def slower() -> None:
        clock.now += next(speed)

    turns = Turns({"a": Work(slower), "b": Work(slower)}).run(3)
    assert turns.seconds == {"a": [1.0, 10.0, 100.0], "b": [1.0, 5.0, 300.0]}
    assert turns.ratio("a", "b") == 1.0  # of 1, 2 and 1/3
    assert turns.median("a") / turns.median("b") == 2.0
    assert ratio([2.0, 4.0, 9.0], [1.0, 1.0]) == 3.0  # a round that one of them lacks is left out


def test_a_pause_and_a_call_of_its_own_come_before_a_turn_and_are_not_timed(clock: Clock) -> None:
    given = works(clock, "ab")
    given["b"].wake = clock.work("wake b", 0.5)
    turns = Turns(given, settle=True).run(2)
    a, b = ["pause", "a", "a"], ["pause", "wake b", "b"]
    assert clock.log == [*a, *b, *b, *a]
    assert turns.seconds["a"] == pytest.approx([1.0, 1.0])
    assert turns.seconds["b"] == pytest.approx([2.0, 2.0])


def test_uncounted_rounds_warm_up(clock: Clock) -> None:
    turns = Turns(works(clock, "ab"), uncounted=2).run(1)
    assert clock.log == list("ababab")
    assert turns.seconds == {"a": [1.0], "b": [2.0]}


def test_a_block_lasts_long_enough_and_its_samples_are_of_a_call(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 8.0)
    given = works(clock, "abc") | {"long": Work(clock.work("long", 20.0))}
    for work in given.values():
        work.calls = None
    turns = Turns(given)
    assert {name: work.calls for name, work in turns.works.items()} == {
        "a": 8, "b": 4, "c": 3, "long": 1,
    }  # fmt: skip
    assert [work.lasts for work in turns.works.values()] == [8.0, 8.0, 9.0, 20.0]
    assert clock.log.count("long") == 2  # once to warm it up
    clock.log.clear()
    turns.run(1)
    assert clock.log == [*"a" * 8, *"b" * 4, *"c" * 3, "long"]
    assert [turns.seconds[name] for name in turns.works] == [[1.0], [2.0], [3.0], [20.0]]
    assert turns.cpu_seconds["a"] == [2.0]


def test_a_block_has_no_more_calls_than_there_may_be(clock: Clock) -> None:
    turns = Turns({"nothing": Work(lambda: None, calls=None)})
    assert turns.works["nothing"].calls == timing.MOST_CALLS


def test_inputs_take_turns_over_all_blocks(clock: Clock) -> None:
    inputs = itertools.cycle([(1,), (2,), (3,)])
    given = {name: Work(clock.work(name), calls=2, inputs=inputs) for name in "ab"}
    Turns(given).run(2)
    assert clock.log == ["a 1", "a 2", "b 3", "b 1", "b 2", "b 3", "a 1", "a 2"]


def test_rounds_end_before_the_time_does(clock: Clock) -> None:
    assert list(rounds(5)) == [0, 1, 2, 3, 4]
    assert len(Turns(works(clock)).run(50, 1e-6).seconds["a"]) == LEAST_ROUNDS
    assert len(Turns(works(clock)).run(50, 33.0).seconds["a"]) == 5  # a round takes 6 seconds
    assert len(Turns(works(clock)).run(2, 0.0).seconds["a"]) == 2


def test_samples_of_an_interrupted_round_are_kept(clock: Clock) -> None:
    """In the lists that were given, with what was done after each turn."""
    seconds: dict[str, list[float]] = {"a": [7.0], "b": []}
    given, done = works(clock, "ab"), []
    given["b"].done = lambda: done.append("b")

    def interrupt() -> None:
        if len(done) == 2:
            raise KeyboardInterrupt

    turns = Turns(given, seconds=seconds)
    with pytest.raises(KeyboardInterrupt):
        turns.run(9, tick=interrupt)
    assert seconds == {"a": [7.0, 1.0, 1.0], "b": [2.0, 2.0]}
    assert gc.isenabled()


def test_nothing_is_collected_between_the_rounds(clock: Clock) -> None:
    enabled: list[bool] = []
    Turns({"a": Work(lambda: enabled.append(gc.isenabled()))}).run(2)
    assert enabled == [False, False]
    assert gc.isenabled()


def test_no_candidates_have_no_turns(clock: Clock) -> None:
    ticks: list[float] = []
    Turns({}).run(3, tick=lambda: ticks.append(clock.now))
    assert ticks == [0.0] * 3


def test_calls_that_were_verified_have_one_round_that_is_not_counted(clock: Clock) -> None:
    assert timing.in_turn({"a": clock.work("a"), "b": clock.work("b")}, 2) == {
        "a": [1.0, 1.0],
        "b": [1.0, 1.0],
    }
    assert clock.log == list("ababba")


def test_the_clock_on_the_wall_is_that_of_the_cpu() -> None:
    assert timer_for(torch.device("cpu")) == (wall, 0)
    assert wall(lambda: None) >= 0


@pytest.mark.parametrize(("size", "total", "count"), [(30, 100, 4), (100, 100, 2), (1, 100, 32)])
def test_buffers_exceed_the_cache_together(size: int, total: int, count: int) -> None:
    made = timing.rotating(iter(range(100)).__next__, size, total)
    assert made == list(range(count))
    assert count * size >= total or count == timing.MOST_BUFFERS


def test_a_buffer_of_no_bytes_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="size must be at least 1 byte; got 0"):
        timing.rotating(lambda: 0, 0)
