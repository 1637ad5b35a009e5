"""Times of a few alternatives, taken where they will run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def best_times(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The least seconds of each of ``runs``, which take turns ``repeats`` times after a warm-up.

    With one thread it is the thread's own processor time, which other processes do not lengthen;
    with more it is the clock.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(runs)
    with torch.no_grad():
        for repeat in range(-1, repeats):
            for i, run in enumerate(runs):
                start = clock()
                run()
                if repeat >= 0:
                    best[i] = min(best[i], clock() - start)
    return best
