"""What is heard of compiled networks by whoever records a step: that they ran, and no more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stepfuse.kernels.torch_names import disable_current_modes


@dataclass(frozen=True)
class Ran:
    """A network of an `Optimized` that ran, out of its cache, and what the call was like.

    While somebody who listened holds this, the network stays in the cache.
    """

    optimized: Any
    cache: Any
    call: Any
    network: Any
    moves: int  # of the network when it ran

    def holds(self) -> bool:
        """Whether such a call would run it again, on the same tensors and to the same result."""
        with self.cache.lock:
            known = self.cache.known(self.call)
            if known is not self.network or known.moves != self.moves:
                return False
            return known.changed() is None


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
    for networks in _listeners.lists:
        if network not in networks:
            network.cache.pin(network)
            networks.append(network)


def is_listened_to() -> bool:
    """Whether somebody listens to this thread: a step runs here that may be recorded."""
    return bool(_listeners.lists)


@contextmanager
def unseen() -> Iterator[None]:
    """What is made inside belongs into no step that is being recorded, and can be written to
    outside of ``torch.inference_mode``, too.
    """
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield
