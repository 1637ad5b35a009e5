"""Which compiled networks ran: asked by whoever keeps what one of them did, a recorded step say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ran:
    """A network of an `Optimized` that ran, and what the arguments of the call were like."""

    optimized: Any
    call: Any
    network: Any

    def holds(self) -> bool:
        """Whether such a call would run it again, and to the same result."""
        with self.optimized._lock:
            known = self.optimized._known(self.call)
            return bool(known is self.network and known.changed() is None)


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
