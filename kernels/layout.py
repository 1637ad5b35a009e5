"""Memory layouts: kernels see contiguous or channels-last tensors, all of one call alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels-last where x is that and nothing else, contiguous for all others."""
    if x.is_contiguous() or x.dim() not in _CHANNELS_LAST:
        return torch.contiguous_format
    last = _CHANNELS_LAST[x.dim()]
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x in that layout: itself, or a copy where it is strided otherwise."""
    if x.is_contiguous(memory_format=layout):
        return x
    return x.contiguous(memory_format=layout)


def resolved(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors with their values in memory, which is all that kernels read.

    A view such as ``z.conj().imag`` has a pending negation, and the zeros that forward-mode
    differentiation makes have no memory at all. Every op passes its inputs through here before any
    backend sees them.
    """
    for x in tensors:
        if x is not None and (x.is_neg() or x._is_zerotensor()):
            return tuple(None if x is None else _in_memory(x) for x in tensors)
    return tensors


def _in_memory(x: Tensor) -> Tensor:
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x.resolve_neg()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself where it has that dtype."""
    return x if x.dtype is dtype else x.to(dtype)


def buffer_for(out: Tensor, layout: torch.memory_format) -> Tensor:
    """What a kernel may write in that layout: ``out`` itself, or a tensor to be copied into it."""
    if out.is_contiguous(memory_format=layout):
        return out
    return torch.empty_like(out, memory_format=layout)


def as_images(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[N, C, ...] as [N, C, H, W] without a copy where all are channels-last in another rank.

    PyTorch has channels-last formats for 2 and 3 spatial dimensions; one dimension (sequences), or
    four, become an image of width 1. Tensors that are not all channels-last come back unchanged.
    """
    first = tensors[0]
    if first.dim() in (2, 4, 5) or first.is_contiguous():
        return tensors
    last = [x.movedim(1, -1) for x in tensors]
    if not all(x.is_contiguous() for x in last):
        return tensors
    count, channels = first.shape[:2]
    return tuple(x.reshape(count, -1, 1, channels).movedim(-1, 1) for x in last)
