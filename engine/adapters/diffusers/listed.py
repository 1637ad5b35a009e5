"""What a timestep on a device is, known without reading it there.

    for t in scheduler.timesteps:      t is a view of one entry of the list
        unet(x, t)                     its address says which; the list is read once, as a whole

Reading a value back waits for everything that was launched before it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeGuard
from weakref import WeakSet

import torch
from torch import Tensor


def version(x: Tensor) -> int:
    """Grows with every change in place; tensors made in inference mode do not count them."""
    return 0 if x.is_inference() else x._version


def place_in(t: Tensor, listed: Tensor) -> int | None:
    """Where t is a view of one entry of ``listed``: which, without reading either."""
    if t.dtype is not listed.dtype or t.numel() != 1 or not listed.is_contiguous():
        return None
    place, rest = divmod(t.data_ptr() - listed.data_ptr(), listed.element_size())
    return place if rest == 0 and 0 <= place < len(listed) else None


class Listed:
    """The timesteps of the schedulers that some pipelines have at the moment.

    Pipelines are held weakly; copies and pickles know none.
    """

    def __init__(self) -> None:
        self._pipes: WeakSet[Any] = WeakSet()
        self._read: dict[int, tuple[Tensor, int, list[int]]] = {}  # by id of the list

    def add(self, pipe: Any) -> None:
        """One whose ``scheduler.timesteps`` may be handed to the U-Net."""
        self._pipes.add(pipe)

    def values(self, t: Tensor) -> list[int] | None:
        """The timestep at t, where that is an entry of a list, also one that was expanded to all
        samples; None where it is not.
        """
        if t.dim() == 1 and len(t) > 1 and t.stride(0) == 0:
            t = t[:1]
        for listed in self._lists():
            at = place_in(t, listed) if t.device == listed.device else None
            if at is not None:
                return [self._read_back(listed)[at]]
        return None

    def beside(self, timesteps: Collection[int], most: int) -> list[int]:
        """Those of the lists, of up to ``most`` entries, that hold one of ``timesteps``."""
        found: list[int] = []
        for listed in self._lists():
            if len(listed) <= most:
                values = self._read_back(listed)
                found += values if not set(timesteps).isdisjoint(values) else []
        return found

    def _lists(self) -> list[Tensor]:
        schedulers = [getattr(pipe, "scheduler", None) for pipe in list(self._pipes)]
        lists = [getattr(scheduler, "timesteps", None) for scheduler in schedulers]
        return [v for v in lists if _is_list(v)]

    def _read_back(self, listed: Tensor) -> list[int]:
        read = self._read.get(id(listed))
        if read is None or read[0] is not listed or read[1] != version(listed):
            current = {id(v) for v in self._lists()}
            for old in self._read.keys() - current:
                del self._read[old]
            read = self._read[id(listed)] = listed, version(listed), listed.tolist()
        return read[2]

    def __reduce__(self) -> Any:
        return Listed, ()


def _is_list(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of whole numbers, one after the other."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 1
        and value.dtype in (torch.int32, torch.int64)
        and not value.is_meta
    )
