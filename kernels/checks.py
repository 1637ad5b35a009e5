"""Argument checks the ops share; every message names the value received and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_float(name: str, x: Tensor) -> None:
    """TypeError unless x holds floats of 16, 32 or 64 bits."""
    accepted = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if x.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise TypeError(f"{name} must be one of {names}; got {x.dtype}")


def check_like(name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """ValueError unless x has ``shape`` and lives on the device of ``like``."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the input; got {x.device}")


def per_sample(name: str, value: int | Tensor, count: int, device: torch.device) -> Tensor:
    """``value`` as int64 [count] on ``device``: an int is repeated, a tensor checked.

    Ints are taken modulo 2^64, so that an unsigned 64-bit seed keeps its bits.
    """
    if isinstance(value, Tensor):
        if value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be an int or an int64 tensor; got {value.dtype}")
        if value.numel() not in (1, count) or value.dim() > 1:
            raise ValueError(
                f"{name} must hold one value or one per sample ({count}); got {tuple(value.shape)}"
            )
        return value.to(device=device, dtype=torch.int64).expand(count).contiguous()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor; got {type(value).__name__}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must fit in 64 bits; got {value}")
    signed = value - 2**64 if value >= 2**63 else value
    return torch.full((count,), signed, dtype=torch.int64, device=device)


def sample_indices(first: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Sample numbers as int64 [count]: first, first+1, ... for an int, the tensor itself otherwise."""
    if isinstance(first, Tensor):
        if first.shape != (count,):
            raise ValueError(f"sample indices must have shape ({count},); got {tuple(first.shape)}")
        return per_sample("sample indices", first, count, device)
    return per_sample("first sample index", first, count, device) + torch.arange(
        count, device=device
    )
