"""Which compiled networks ran: asked by whoever keeps what one of them did, a recorded step say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Ran(Protocol):
    """A compiled network that ran."""

    @property
    def optimized(self) -> Any:
        """The `stepfuse.engine.optimize.Optimized` that it belongs to."""

    def holds(self) -> bool:
        """Whether a call like that one would run it again, and to the same result."""


class _Listeners(threading.local):
    def __init__(self) -> None:
        self.lists: list[list[Ran]] = []


_listeners = _Listeners()


@contextmanager
def listening() -> Iterator[list[Ran]]:
    """A list of what runs inside, in this thread, in its order; each network once."""
    heard: list[Ran] = []
    _listeners.lists.append(heard)
    try:
        yield heard
    finally:
        _listeners.lists.pop()


def tell(network: Ran) -> None:
    """Say that a network is about to run."""
    for heard in _listeners.lists:
        if network not in heard:
            heard.append(network)
