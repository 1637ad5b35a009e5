"""A block of calls as one CUDA graph, so that the device is timed and not the launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from stepfuse.bench.cuda_timing import WARM_UP
from stepfuse.bench.timing import Timer, Work

LAUNCHES = 100  # calls of a graph


@dataclass
class Graphed(Work):
    """`Work` whose block is the replay of a graph of `LAUNCHES` calls, each on its next inputs.

    It is captured when the block is sized: once the work was verified, and before anything is
    timed. What cannot be captured raises there, and is left out with the reason. What the calls
    return is dropped inside the capture, so that one call's memory serves the next.

    Args:
        api: ``torch.cuda``, or what stands in for it.
    """

    api: Any = None
    _replay: Callable[[], Any] | None = field(default=None, init=False)

    def run(self, calls: int | None = None) -> None:
        """The graph, whole, whatever ``calls`` says; before there is one, the calls."""
        if self._replay is None:
            super().run(calls)
        else:
            self._replay()

    def size(self, timer: Timer) -> None:
        """Warm up beside the current stream, and capture.

        The last call before the capture is made where waiting for the device raises: a capture that
        fails in the middle leaves PyTorch's allocator in it.
        """
        api = torch.cuda if self.api is None else self.api
        side = api.Stream()
        side.wait_stream(api.current_stream())
        with api.stream(side):
            super().run(WARM_UP)
            with _waiting_raises(api):
                super().run(1)
        api.current_stream().wait_stream(side)
        graph = api.CUDAGraph()
        with api.graph(graph):
            super().run(LAUNCHES)
        self.calls, self._replay = LAUNCHES, graph.replay
        self.lasts = timer(self.run)


@contextmanager
def _waiting_raises(api: Any) -> Iterator[None]:
    before = api.get_sync_debug_mode()
    api.set_sync_debug_mode("error")
    try:
        yield
    finally:
        api.set_sync_debug_mode(before)
