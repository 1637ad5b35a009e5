"""Whose turn it is to use a sampler's buffers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stepfuse.engine.replay.device_order import DeviceOrder


class Turn:
    """A lock for a ``with`` block that raises where a thread would wait for itself for ever.

    It may be left in another thread than it was entered in, as a generator may be closed there.
    What one turn has launched on a device is done before what the next one launches, on whatever
    stream: the buffers are read long after a call has returned.
    """

    def __init__(self, order: DeviceOrder) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._order = order

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise RuntimeError(
                "the sampler is busy with an unfinished iterate() or a callback of this thread: "
                "finish or close it first, or build a second sampler"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()
        try:
            self._order.wait()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._order.done()
        finally:
            self._leave()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Somebody else's code runs inside, which may leave another stream as the current one."""
        self._order.done()
        try:
            yield
        finally:
            self._order.wait()

    def _leave(self) -> None:
        self._owner = None
        self._lock.release()
