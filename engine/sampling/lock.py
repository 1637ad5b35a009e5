"""Whose turn it is to use a sampler's buffers."""

from __future__ import annotations

import threading


class Turn:
    """A lock for a ``with`` block that raises where a thread would wait for itself for ever.

    It may be left in another thread than it was entered in, as a generator may be closed there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise RuntimeError(
                "the sampler is busy with an unfinished iterate() or a callback of this thread: "
                "finish or close it first, or build a second sampler"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()
