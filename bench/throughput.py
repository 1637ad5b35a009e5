"""Throughput: loops one right after the other, for long enough that single ones do not matter."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from stepfuse.bench.cuda_timing import Timer
from stepfuse.bench.latency import Tick, in_turn
from stepfuse.bench.loops import Loop
from stepfuse.bench.record import Windows

WINDOW_SECONDS = 0.5


def loops_in_window(samples: Sequence[float]) -> int:
    """How many loops of this latency fill a window."""
    return max(1, math.ceil(WINDOW_SECONDS / statistics.median(samples)))


def throughput(
    loops: Mapping[str, Loop],
    latencies: Mapping[str, Sequence[float]],
    into: Mapping[str, Windows],
    most: int,
    seconds: float | None,
    timer: Timer,
    tick: Tick = lambda: None,
) -> None:
    """Append to ``into`` a window of each candidate, once a round.

    A loop that fills a window by itself is not run again: its latency is its window. Every window
    holds whole loops, as many as its candidate's latency asks for.
    """
    counts = {name: loops_in_window(latencies[name]) for name in loops}
    for name, count in counts.items():
        if count == 1:
            windows = into[name]
            windows.seconds.extend(latencies[name])
            windows.images.extend([windows.batch] * len(latencies[name]))

    def turn(name: str, loop: Loop) -> None:
        windows = into[name]
        windows.seconds.append(timer.repeated(loop.images, counts[name]))
        windows.images.append(windows.batch * counts[name])

    in_turn({n: loop for n, loop in loops.items() if counts[n] > 1}, most, seconds, turn, tick)
