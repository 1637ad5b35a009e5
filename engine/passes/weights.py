"""The weights of a network: where they live, and whether they are still what was packed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stepfuse.engine.passes.released import Released

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
        self._model = model
        self._owners = {name: find(model, name) for name in names}
        self.read()

    def read(self) -> dict[str, Tensor]:
        """The weights as they are now, which from here on are the unchanged ones."""
        tensors = {name: _held(owner, leaf) for name, (owner, leaf) in self._owners.items()}
        self._watched = {
            name: _watch(*self._owners[name], tensor)
            for name, tensor in tensors.items()
            if not isinstance(tensor, FakeTensor)  # they have no memory that could change
        }
        self._state = self._now()
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def changed(self) -> str | None:
        """The name of a weight that is not what it was, or None."""
        now = self._now()
        if now == self._state:
            return None
        pairs = zip(self._watched, now, self._state, strict=True)
        return next(name for name, new, old in pairs if new != old)

    def release(self, name: str) -> None:
        """Free the memory of a weight, wherever in the model it stands; it cannot be read again."""
        tensor = _held(*self._owners.pop(name))
        self._watched.pop(name, None)
        self._state = self._now()
        stand_in = Released.of(tensor)
        for module in self._model.modules():
            for table in (module._parameters, module._buffers):
                for leaf, held in table.items():
                    if held is tensor:
                        table[leaf] = stand_in
        # others may hold the parameter itself
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def _now(self) -> list[tuple[Any, ...]]:
        return [
            (held[leaf] is tensor, tensor._version if counted else 0, tensor.data_ptr(), probe[0])
            for held, leaf, tensor, counted, probe in self._watched.values()
        ]


def _watch(owner: nn.Module, leaf: str, tensor: Tensor) -> tuple[Any, ...]:
    """Where it stands, itself, whether it counts how often it was written to, and a probe."""
    return _table(owner, leaf), leaf, tensor, not tensor.is_inference(), _probe(tensor)


def _table(owner: nn.Module, leaf: str) -> Any:
    """The dictionary of the module that holds it."""
    return owner._parameters if leaf in owner._parameters else owner._buffers


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
