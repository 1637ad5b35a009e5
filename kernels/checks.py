"""Argument checks the ops share; every message names the value received and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAST = 2**63 - 1


def check_float(name: str, x: Tensor) -> None:
    """TypeError unless x holds floats of 16, 32 or 64 bits."""
    if x.dtype not in _FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise TypeError(f"{name} must be one of {names}; got {x.dtype}")


def check_like(name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raise unless x holds floats, has ``shape`` and lives on the device of ``like``."""
    if x.dtype not in _FLOATS:
        check_float(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the input; got {x.device}")


def check_out(name: str, out: Tensor, like: Tensor) -> None:
    """Raise unless ``out`` can take a result of the shape and dtype of ``like``."""
    check_like(name, out, like.shape, like)
    if out.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like the input; got {out.dtype}")


def per_sample(name: str, value: int | Tensor, count: int, device: torch.device) -> Tensor:
    """``value`` as int64 [count] on ``device``: an int is repeated, a tensor checked.

    A tensor that is one already comes back as it is, without a copy or a read on the host. Ints
    are taken modulo 2^64, so that an unsigned 64-bit seed keeps its bits.
    """
    if isinstance(value, Tensor):
        if value.dtype is torch.int64 and value.shape == (count,) and value.device == device:
            return value.contiguous()
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be an int or an int64 tensor; got {value.dtype}")
        if value.dim() > 1 or value.numel() not in (1, count):
            raise ValueError(
                f"{name} must hold one value or one per sample ({count}); got {tuple(value.shape)}"
            )
        if value.device != device:
            value = value.to(device)
        return value.to(torch.int64).expand(count).contiguous()
    return torch.full((count,), _signed(name, value), dtype=torch.int64, device=device)


def sample_indices(first: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Sample numbers as int64 [count]: first, first+1, ... for an int, the tensor itself otherwise.

    Numbers are 64-bit patterns too: the one after 2^63 - 1 is -2^63, that is 2^63.
    """
    if isinstance(first, Tensor):
        if first.shape != (count,):
            raise ValueError(f"sample indices must have shape ({count},); got {tuple(first.shape)}")
        return per_sample("sample indices", first, count, device)
    start = _signed("first sample index", first)
    if start + count <= _LAST:
        return torch.arange(start, start + count, dtype=torch.int64, device=device)
    return torch.full((count,), start, device=device) + torch.arange(count, device=device)


def _signed(name: str, value: int) -> int:
    """The int64 with the 64 bits of ``value``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor; got {type(value).__name__}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must fit in 64 bits; got {value}")
    return value - 2**64 if value > _LAST else value
