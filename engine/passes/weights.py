"""The weights of a network: where they live, and whether they are still what was packed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns the parameter or buffer ``name``, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


class Weights:
    """The parameters and buffers a network was built from.

    ``changed`` compares, for each of them, the tensor itself, its address, its version counter, and
    (CPU) one element of it: writing through ``.data`` does not raise the counter.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._owners = {name: find(model, name) for name in names}
        self.read()

    def read(self) -> dict[str, Tensor]:
        """The weights as they are now, which from here on are the unchanged ones."""
        self.tensors = {n: _held(owner, leaf) for n, (owner, leaf) in self._owners.items()}
        # fake tensors have no memory that could change
        self._watched = [
            (name, owner._parameters if leaf in owner._parameters else owner._buffers, leaf, tensor)
            for (name, (owner, leaf)), tensor in zip(
                self._owners.items(), self.tensors.values(), strict=True
            )
            if not isinstance(tensor, FakeTensor)
        ]
        self._probes = [_probe(tensor) for *_, tensor in self._watched]
        self._state = self._now()
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    def changed(self) -> str | None:
        """The name of a weight that is not what it was, or None."""
        now = self._now()
        if now == self._state:
            return None
        pairs = zip(self._watched, now, self._state, strict=True)
        return next(name for (name, *_), new, old in pairs if new != old)

    def _now(self) -> list[tuple[Any, ...]]:
        return [
            (held[leaf] is tensor, tensor._version, tensor.data_ptr(), probe[0])
            for (_, held, leaf, tensor), probe in zip(self._watched, self._probes, strict=True)
        ]


def address(tensor: Tensor) -> int | None:
    """Where a tensor's memory starts; None for packed weights and fake tensors, which hide it."""
    if tensor.layout is not torch.strided or isinstance(tensor, FakeTensor):
        return None
    return tensor.untyped_storage().data_ptr()


def _held(owner: nn.Module, leaf: str) -> Tensor:
    tensor = getattr(owner, leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _probe(tensor: Tensor) -> Any:
    """An indexable view of one element's bits; of nothing where they cannot be read cheaply."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.is_complex():
        return (0,)
    flat = tensor.detach()
    one = flat.as_strided((1,), (1,), flat.storage_offset() + _middle(flat))
    bits: Any = one.view(_BITS[one.element_size()]).numpy()
    return memoryview(bits)


def _middle(tensor: Tensor) -> int:
    """Offset of the element in the middle of every dimension."""
    return sum(
        (size // 2) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
