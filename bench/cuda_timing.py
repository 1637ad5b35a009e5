"""Timing on a CUDA device, by the device's own clock. Never run on a GPU: see the tests.

Work is launched, not done, when a call returns, so that a clock in Python times the launches. Here
two events are recorded on the stream, before and after the work, and the device notes when it
passes them. Three things make such a figure what a user meets:

1. Warm-up. The first calls load kernels, choose algorithms and raise the clock rate.
2. A cold L2. The cache of a data-centre GPU (40 to 126 MB) holds every tensor of a small network,
   so that a kernel timed on its own data again and again reads none of it from memory. So a buffer
   larger than the cache is written before each turn; the calls of a block have to go over tensors
   that together are larger (`timing.rotating`).
3. Many short calls between one pair of events (`timing.Work.calls`). An event costs about as much
   as a short kernel; a pair around every replay of a graph would time the events.

The flush runs before the first event on the same stream: it is not part of the time, and its
launch gives the host a lead, so that the device does not wait for the host between the two events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FLUSH = 2  # times the L2 that is written
L2_BYTES = 128 << 20  # where the device does not say
WARM_UP = 3  # calls


class CudaTimer:
    """`timing.Timer` by CUDA events on the current stream of a device.

    That device is the current one while the work is launched: an event belongs to the device that
    was current when it was recorded first, and only a stream of the same can pass it.

    Args:
        device: index or name of the device; without a number, the one that is current now.
        api: ``torch.cuda``, or what stands in for it.
        flush: returns a callable that overwrites so many bytes of the device's memory.
    """

    def __init__(
        self,
        device: Any = None,
        api: Any = None,
        flush: Callable[[int], Callable[[], Any]] | None = None,
    ) -> None:
        self.api = torch.cuda if api is None else api
        named = device if isinstance(device, int) else torch.device(device or "cuda").index
        self.device: int = self.api.current_device() if named is None else named
        self.l2_bytes = l2_bytes(self.api.get_device_properties(self.device))
        self._flush = (flush or self._buffer)(FLUSH * self.l2_bytes)

    def __call__(self, run: Callable[[], Any]) -> float:
        """Seconds of ``run``, which finds nothing of its data in the cache."""
        with self.api.device(self.device):
            stream = self.api.current_stream(self.device)
            start = self.api.Event(enable_timing=True)
            end = self.api.Event(enable_timing=True)
            self.api.synchronize(self.device)
            self._flush()
            start.record(stream)
            run()
            end.record(stream)
        # elapsed_time is only known once the device has passed both events
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _buffer(self, size: int) -> Callable[[], Any]:
        return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", self.device)).zero_


def l2_bytes(properties: Any) -> int:
    """Bytes of the L2 cache of a device."""
    return int(getattr(properties, "L2_cache_size", 0) or L2_BYTES)
