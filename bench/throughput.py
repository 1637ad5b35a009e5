"""Throughput: loops one right after the other, for long enough that single ones do not matter."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence

from stepfuse.bench.loops import Loop
from stepfuse.bench.record import Windows
from stepfuse.bench.timing import Timer, Turns, Work, wall

WINDOW_SECONDS = 0.5


def loops_in_window(samples: Sequence[float]) -> int:
    """How many loops of this latency fill a window."""
    return max(1, math.ceil(WINDOW_SECONDS / statistics.median(samples)))


def throughput(
    loops: Mapping[str, Loop],
    latencies: Mapping[str, Sequence[float]],
    into: Mapping[str, Windows],
    timer: Timer = wall,
) -> Turns:
    """Turns that append to ``into`` a window of each candidate, once a round.

    A loop that fills a window by itself is not run again: its latency is its window. Every window
    holds whole loops, as many as its candidate's latency asks for.
    """
    works = {}
    for name, loop in loops.items():
        windows, count = into[name], loops_in_window(latencies[name])
        if count == 1:
            windows.seconds.extend(latencies[name])
            windows.images.extend([windows.batch] * len(latencies[name]))
        else:
            window = Work(loop.images, calls=count).run
            done = functools.partial(windows.images.append, windows.batch * count)
            works[name] = Work(window, wake=loop.wake, done=done)
    seconds = {name: into[name].seconds for name in works}
    return Turns(works, settle=True, timer=timer, seconds=seconds)
