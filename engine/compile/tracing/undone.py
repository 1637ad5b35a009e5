"""Running a forward without a trace: what its operators write to tensors is taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.kernels.torch_names import (
    FakeTensor,
    TorchDispatchMode,
    disable_current_modes,
    pytree,
    set_versions,
)


@contextlib.contextmanager
def undone(tensors: Iterable[Tensor]) -> Iterator[None]:
    """On leaving, ``tensors`` (dense ones) hold what they held, and count as never written to.

    Nothing is copied but the memory that an operator is about to write to.
    """
    writes = _Writes(tensors)
    try:
        with writes:
            yield
    finally:
        writes.take_back()


@contextlib.contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """As `undone`, for what runs where no mode sees it, as within a trace: copies every tensor."""
    with disable_current_modes():
        before = [(one, _version(one), one.detach().clone()) for one in tensors if _is_dense(one)]
    try:
        yield
    finally:
        with disable_current_modes():
            _put_back(before)


def _put_back(before: Sequence[tuple[Tensor, int, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, version, content in before:
            if tensor.is_inference():
                with torch.inference_mode():
                    tensor.copy_(content)
            elif tensor._version != version:
                tensor.detach().copy_(content)
                _set_version([(tensor, version)])


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the content of watched memory before the first operator that writes to it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: dict[int, list[tuple[Tensor, int]]] = {}  # memory: tensors, their versions
        for tensor in tensors:
            if _is_dense(tensor):
                memory = tensor.untyped_storage()._cdata
                self._watched.setdefault(memory, []).append((tensor, _version(tensor)))
        self._before: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(kwargs.get(argument.name) if i >= len(args) else args[i])
        return func(*args, **kwargs)

    def _keep(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor):
                continue
            if tensor.layout is torch.strided:
                memory = tensor.untyped_storage()
                if memory._cdata in self._watched and memory._cdata not in self._before:
                    self._before[memory._cdata] = memory.clone()  # type: ignore[no-untyped-call]

    def take_back(self) -> None:
        """Put back what was kept."""
        for memory, content in self._before.items():
            watched = self._watched[memory]
            watched[0][0].untyped_storage().copy_(content)
            _set_version(watched)


def _is_dense(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _set_version(versions: Sequence[tuple[Tensor, int]]) -> None:
    """How often they count as written to; tensors of inference mode do not count."""
    counting = [(tensor, version) for tensor, version in versions if not tensor.is_inference()]
    if counting:
        tensors, numbers = zip(*counting, strict=True)
        set_versions(tensors, numbers)
