"""Verify, then time in turn: the one way in which anything is timed here.

1. Verified first. Before a clock runs, every candidate shows what it computes. A wrong result
   (AssertionError) ends the comparison; what cannot run on this machine is named and left out.
2. Warm. A candidate has run before its first time counts: when it was verified, when its block was
   sized, or in rounds that do not count.
3. In turn. A round times every candidate once, one right after the other, so that whatever else the
   machine does meets them all. Each round begins with the one that came second in the round before.
4. Pauses. Threads of one runtime spin for some milliseconds after their last work, on cores that
   the next candidate is timed on. Where candidates bring threads of their own, each turn begins
   with a pause in which the others fall asleep, and an untimed call that wakes its own.
5. Blocks. A call is timed by itself, or, where it is as short as reading the clock, in a block of
   many, over inputs that together exceed a cache, which must not serve the same tensor every time.
6. No garbage is collected between the first round and the last.
7. Every sample is kept. What is reported is medians over the rounds, and how many times longer one
   takes than another is the median of their ratios in each round: two turns of a round met the same
   machine, two medians may not have.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from stepfuse.bench import samples
from stepfuse.bench.able import Say, able, to_stderr
from stepfuse.bench.cuda_timing import WARM_UP, CudaTimer

SETTLE_SECONDS = 0.02
BLOCK_SECONDS, MOST_CALLS = 0.004, 2000
ROTATED_BYTES = 128 << 20  # larger than a last-level cache that one process may count on
MOST_BUFFERS = 32
LEAST_ROUNDS = 3  # however short the time limit is

T = TypeVar("T")
Call = Callable[[], Any]
Timer = Callable[[Call], float]  # runs it once and returns the seconds


@dataclass
class Work:
    """What a candidate does in its turn.

    Args:
        call: the work that is timed.
        verify: raises AssertionError where the result of ``call`` is wrong, and whatever else
            where it cannot run here.
        wake: sets its threads to work after a pause; by default one call.
        calls: of a block; None for as many as last `BLOCK_SECONDS`.
        inputs: the arguments of each call, one after the other.
        done: is called after every turn that counts.

    Attributes:
        lasts: about how many seconds a block takes, where its calls were counted.
    """

    call: Callable[..., Any]
    verify: Call = lambda: None
    wake: Call | None = None
    calls: int | None = 1
    inputs: Iterator[tuple[Any, ...]] = field(default_factory=lambda: itertools.repeat(()))
    done: Call = lambda: None
    lasts: float = field(default=0.0, init=False)

    def run(self, calls: int | None = None) -> None:
        """A block, or so many calls."""
        call = self.call
        for arguments in itertools.islice(self.inputs, calls or self.calls):
            call(*arguments)

    def size(self, timer: Timer) -> None:
        """Count the calls of a block where that is left to us."""
        if self.calls is not None:
            return
        one = functools.partial(self.run, 1)
        one()
        each = timer(one)
        if each < BLOCK_SECONDS:  # one of them tells little
            each = statistics.median([each, timer(one), timer(one)])
        each = max(each, 1e-9)
        self.calls = max(1, min(MOST_CALLS, round(BLOCK_SECONDS / each)))
        self.lasts = self.calls * each


def wall(run: Call) -> float:
    """`Timer` by the clock on the wall, for work that is done when the call returns."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timer_for(device: torch.device) -> tuple[Timer, int]:
    """Events on a GPU, the wall clock elsewhere; and rounds that verified work still has to run."""
    return (CudaTimer(device), WARM_UP) if device.type == "cuda" else (wall, 0)


class Turns:
    """Candidates that were verified, and the seconds of each of their turns.

    Args:
        works: by name, in the order of the first round.
        settle: whether candidates bring threads of different runtimes: see above.
        uncounted: rounds before the first that counts.
        timer: what takes the time.
        seconds: lists to append to, for whoever wants the samples even if a round is interrupted.
        say: is told who cannot run here, and why.

    Attributes:
        works: those that can run here.
        found: what their `verify` returned.
        seconds: of a call, one for each round. After an interruption, lists may differ by one.
        cpu_seconds: processor time of a call, of all threads together.

    Raises what `verify` raises where a result is wrong.
    """

    def __init__(
        self,
        works: Mapping[str, Work],
        *,
        settle: bool = False,
        uncounted: int = 0,
        timer: Timer = wall,
        seconds: Mapping[str, list[float]] | None = None,
        say: Say = to_stderr,
    ) -> None:
        self.settle, self.uncounted, self.timer = settle, uncounted, timer
        self.found = able({name: work.verify for name, work in works.items()}, say)
        sized = able({n: functools.partial(works[n].size, timer) for n in self.found}, say)
        self.works = {name: works[name] for name in sized}
        self.seconds = {n: [] if seconds is None else seconds[n] for n in self.works}
        self.cpu_seconds: dict[str, list[float]] = {name: [] for name in self.works}

    def run(
        self, most: int, limit: float | None = None, tick: Callable[[], None] = lambda: None
    ) -> Turns:
        """``most`` rounds, fewer where ``limit`` seconds come first; ``tick`` after each."""
        names = list(self.works)
        with undisturbed():
            for name in self.uncounted * names:
                self._time(name)
            for done in rounds(most, limit):
                first = done % max(len(names), 1)
                for name in names[first:] + names[:first]:
                    self.turn(name)
                tick()
        return self

    def turn(self, name: str) -> None:
        """One that counts."""
        seconds, busy = self._time(name)
        calls = self.works[name].calls or 1
        self.seconds[name].append(seconds / calls)
        self.cpu_seconds[name].append(busy / calls)
        self.works[name].done()

    def median(self, name: str) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """How many times longer than ``base`` it takes: the median over the rounds."""
        return samples.ratio(self.seconds[name], self.seconds[base])

    def _time(self, name: str) -> tuple[float, float]:
        work = self.works[name]
        if self.settle:
            time.sleep(SETTLE_SECONDS)
            (work.wake or functools.partial(work.run, 1))()
        busy = time.process_time()
        seconds = self.timer(work.run)
        return seconds, time.process_time() - busy


def rounds(most: int, seconds: float | None = None) -> Iterator[int]:
    """0, 1, ... below ``most``, ended where the next would not fit into ``seconds``.

    At least `LEAST_ROUNDS` are done, or ``most`` where that is less.
    """
    start = time.perf_counter()
    for done in range(most):
        if seconds is not None and done >= LEAST_ROUNDS:
            each = (time.perf_counter() - start) / done
            if each * (done + 1) > seconds:
                return
        yield done


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection inside."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def rotating(make: Callable[[], T], size: int, total: int | None = None) -> list[T]:
    """As many of what ``make`` returns, ``size`` bytes each, as are together larger than a cache.

    There are at least two, so that no call finds what the one before it wrote, and at most
    `MOST_BUFFERS`. ``total`` is `ROTATED_BYTES` unless it is given.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 byte; got {size}")
    count = -(-(total or ROTATED_BYTES) // size)
    return [make() for _ in range(max(2, min(MOST_BUFFERS, count)))]


def in_turn(calls: Mapping[str, Call], count: int) -> dict[str, list[float]]:
    """Seconds of calls that were verified: ``count`` rounds after one that is not counted."""
    return Turns({name: Work(call) for name, call in calls.items()}, uncounted=1).run(count).seconds
