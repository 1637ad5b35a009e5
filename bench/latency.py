"""Latency: the whole loop, candidates in turn, each after a pause and a wake-up of its own."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from stepfuse.bench.cuda_timing import CudaTimer, Timer
from stepfuse.bench.harness import SETTLE_SECONDS
from stepfuse.bench.loops import Loop

LEAST_ROUNDS = 3  # however short the time limit is

Tick = Callable[[], None]


class WallTimer:
    """`Timer` by the clock on the wall, for work that is done when the call returns."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Nothing: a loop that was verified has run."""

    def once(self, run: Callable[[], Any]) -> float:
        return self.repeated(run, 1)

    def repeated(self, run: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return time.perf_counter() - start


def timer_for(device: torch.device) -> Timer:
    """Events on a GPU, the wall clock elsewhere."""
    return CudaTimer(device) if device.type == "cuda" else WallTimer()


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


def in_turn(
    loops: Mapping[str, Loop],
    most: int,
    seconds: float | None,
    turn: Callable[[str, Loop], None],
    tick: Tick,
) -> None:
    """Every candidate's ``turn``, round after round; the first of a round is the next one's second.

    Before each turn: a pause in which threads of the candidate before stop spinning, and one
    evaluation that wakes its own.
    """
    names = list(loops)
    with undisturbed():
        for done in rounds(most, seconds):
            first = done % max(len(names), 1)
            for name in names[first:] + names[:first]:
                time.sleep(SETTLE_SECONDS)
                loops[name].wake()
                turn(name, loops[name])
            tick()


def latency(
    loops: Mapping[str, Loop],
    into: Mapping[str, list[float]],
    most: int,
    seconds: float | None,
    timer: Timer,
    tick: Tick = lambda: None,
) -> None:
    """Append to ``into`` the seconds of each candidate's whole loop, once a round."""

    def turn(name: str, loop: Loop) -> None:
        into[name].append(timer.once(loop.images))

    for loop in loops.values():
        timer.warm_up(loop.images)
    in_turn(loops, most, seconds, turn, tick)


def other_steps(steps: int) -> list[int]:
    """Fewer steps, for time over steps: a quarter and half as many."""
    return sorted({max(1, steps // 4), max(1, steps // 2)} - {steps})
