"""Timing on a CUDA device, by the device's own clock. Never run on a GPU: see the tests.

Work is launched, not done, when a call returns, so that a clock in Python times the launches. Here
two events are recorded on the stream, before and after the work, and the device notes when it
passes them. Three things make such a figure what a user meets:

1. Warm-up. The first calls load kernels, choose algorithms and raise the clock rate.
2. A cold L2. The cache of a data-centre GPU (40 to 126 MB) holds every tensor of a small network,
   so that a kernel timed on its own data again and again reads none of it from memory. Either a
   buffer larger than the cache is written before each timed call (`CudaTimer.once`), or the calls
   take turns over tensors that together are larger (`rotating`, for `CudaTimer.repeated`).
3. Many short calls between one pair of events. An event costs about as much as a short kernel; a
   pair around every replay of a graph would time the events.

The flush runs before the first event on the same stream: it is not part of the time, and its
launch gives the host a lead, so that the device does not wait for the host between the two events.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")

FLUSH = 2  # times the L2 that is written or rotated through
L2_BYTES = 128 << 20  # where the device does not say
WARM_UP = 3


class Timer(Protocol):
    """Times work on a device."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """What has to be done with a call before its first time counts."""

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one call that finds nothing of its data in a cache that can be emptied."""

    def repeated(self, run: Callable[[], Any], count: int) -> float:
        """Seconds of ``count`` calls one after the other, all together."""


class CudaTimer:
    """`Timer` by CUDA events on the current stream.

    Args:
        device: index or name of the device.
        api: ``torch.cuda``, or what stands in for it.
        flush: returns a callable that overwrites so many bytes of the device's memory.
        calls: of a warm-up.
    """

    def __init__(
        self,
        device: Any = None,
        api: Any = None,
        flush: Callable[[int], Callable[[], Any]] | None = None,
        calls: int = WARM_UP,
    ) -> None:
        self.api = torch.cuda if api is None else api
        self.device, self.calls = device, calls
        self.l2_bytes = l2_bytes(self.api.get_device_properties(device))
        self._flush = (flush or self._buffer)(FLUSH * self.l2_bytes)

    def warm_up(self, run: Callable[[], Any]) -> None:
        for _ in range(self.calls):
            run()
        self.api.synchronize(self.device)

    def once(self, run: Callable[[], Any]) -> float:
        return self._between_events(run)

    def repeated(self, run: Callable[[], Any], count: int) -> float:
        if count < 1:
            raise ValueError(f"count must be at least 1; got {count}")

        def all_of_them() -> None:
            for _ in range(count):
                run()

        return self._between_events(all_of_them)

    def _between_events(self, run: Callable[[], Any]) -> float:
        start = self.api.Event(enable_timing=True)
        end = self.api.Event(enable_timing=True)
        self.api.synchronize(self.device)
        self._flush()
        start.record()
        run()
        end.record()
        # elapsed_time is only known once the device has passed both events
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _buffer(self, size: int) -> Callable[[], Any]:
        return torch.empty(size, dtype=torch.uint8, device=self.device or "cuda").zero_


def l2_bytes(properties: Any) -> int:
    """Bytes of the L2 cache of a device."""
    return int(getattr(properties, "L2_cache_size", 0) or L2_BYTES)


def rotating(make: Callable[[], T], size: int, cache: int) -> Iterator[T]:
    """What ``make`` returns, ``size`` bytes each, in turns that together exceed the cache.

    There are at least two, so that no call finds what the one before it wrote.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 byte; got {size}")
    count = max(2, -(-FLUSH * cache // size))
    return itertools.cycle([make() for _ in range(count)])
