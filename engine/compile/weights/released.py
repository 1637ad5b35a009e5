"""A weight whose memory was given back: it still says what it was, and refuses everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.kernels import torch_names


class WeightsReleased(RuntimeError):
    """A weight was asked for that ``optimize(..., weights="released")`` has freed."""


class Released(nn.Parameter):
    """Stands where a parameter stood: its shape, dtype and device, one element of memory.

    Raises `WeightsReleased` for whatever would need values: forward, state_dict, deepcopy, pickle.
    """

    @classmethod
    def of(cls, tensor: Tensor) -> Released:
        """What to put in the place of ``tensor``, NaN everywhere."""
        fill = float("nan") if tensor.is_floating_point() else 0
        one = torch.full((), fill, dtype=tensor.dtype, device=tensor.device)
        made: Released = torch_names.make_subclass(cls, one.expand(tensor.shape), False)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _DESCRIBING:
            with torch_names.without_subclasses():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        raise WeightsReleased(
            f"{name} needs the values of a weight that optimize(..., weights='released') freed "
            "after packing it; keep the weights, or load the model again"
        )


_PROPERTIES = ("shape", "dtype", "device", "layout", "requires_grad", "grad", "grad_fn", "is_leaf",
               "is_cuda", "is_meta", "is_sparse", "is_quantized", "ndim", "nbytes", "itemsize",
               "_version")  # fmt: skip
_METHODS = ("size", "stride", "dim", "numel", "element_size", "data_ptr", "is_floating_point",
            "is_complex", "__hash__", "__len__", "is_contiguous")  # fmt: skip
_DESCRIBING = {getattr(Tensor, name).__get__ for name in _PROPERTIES}
_DESCRIBING |= {getattr(Tensor, name) for name in _METHODS} | {torch.is_floating_point}
