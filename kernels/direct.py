"""What to call for an operator where nobody watches: the shortest way to its kernel.

A recorded step and a compiled network call the same operators again and again with arguments of the
same kind. The dispatcher's way there and back takes 5 to 15 us for an operator of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels.attend import attend, attend_eagerly
from stepfuse.kernels.concatenate import join, join_eagerly
from stepfuse.kernels.convolve import CallSite, convolve
from stepfuse.kernels.group_norm_silu import group_norm_silu


def directly(target: Any) -> Callable[..., Any]:
    """For one place in a straight line of calls; same arguments and result as ``target``."""
    if target is convolve:
        return CallSite()
    short = _SHORT.get(target)
    return short or getattr(target, "_op", target)  # skips a Python frame per call


def blank(target: Any, result: Any) -> Tensor | None:
    """A tensor without memory like ``result``, for an operator that `directly` lets put it into
    ``out``; None for other operators.
    """
    if target is attend:
        n, heads, queries, values = result.shape
        like = torch.empty((n, queries, heads, values), dtype=result.dtype, device="meta")
        return like.transpose(1, 2)
    if target not in (convolve, join):
        return None
    order = torch.channels_last if result.dim() == 4 else torch.contiguous_format
    return torch.empty(result.shape, dtype=result.dtype, device="meta", memory_format=order)


def _group_norm(*arguments: Any) -> Tensor:
    """The public op, which skips the dispatcher where nobody watches it."""
    *shared, silu, backend = arguments
    call: Callable[..., Tensor] = group_norm_silu
    return call(*shared, "silu" if silu else "none", backend)


_SHORT: dict[Any, Callable[..., Tensor]] = {
    torch.ops.stepfuse.group_norm_silu.default: _group_norm,
    attend: attend_eagerly,
    join: join_eagerly,
}
