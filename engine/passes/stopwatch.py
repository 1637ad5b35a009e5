"""Times of a few alternatives, taken where they will run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

_CACHE = 48 << 20  # bytes: more than the part of a last-level cache that one process may count on


def exceed_cache(gm: GraphModule) -> bool:
    """Whether the network's weights are too large to stay in the cache between two evaluations."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder" and "weight" in n.meta]
    held: int = sum(n.meta["val"].nbytes for n in placeholders)
    return held > _CACHE // 2


def best_times(
    runs: Sequence[Callable[[], Any]], repeats: int, warm: Tensor | None = None
) -> list[float]:
    """The least seconds of each of ``runs``, which take turns ``repeats`` times after a warm-up.

    With one thread it is the thread's own processor time, which other processes do not lengthen;
    with more it is the clock. Where ``warm`` is given, caches hold that tensor before every run
    and nothing else.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(runs)
    with torch.no_grad():
        for repeat in range(-1, repeats):
            for i, run in enumerate(runs):
                if warm is not None:
                    _other_memory().sum()
                    warm.sum()
                start = clock()
                run()
                if repeat >= 0:
                    best[i] = min(best[i], clock() - start)
    return best


@functools.cache
def _other_memory() -> Tensor:
    return torch.ones(_CACHE // 4)


def forget() -> None:
    """Free what was held between measurements."""
    _other_memory.cache_clear()
