"""GroupNorm, modulation and SiLU by the C++ module; the contract is that of the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels.cpp.module import DTYPES, native, threads

Parameter = tuple[int, int, int] | None  # address, dtype code, elements from sample to sample


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    out: Tensor,
) -> None:
    """Write the result into ``out``, of the shape, strides and dtype of x; may be x itself."""
    if not x.numel():
        return
    last = _channels_last(x)
    dense, dense_out = x, out
    if last is None or out.stride() != x.stride():
        last, dense = False, x.contiguous()
        dense_out = torch.empty(x.shape, dtype=x.dtype)
    arguments, _kept = _arguments(dense, last, weight, bias, groups, eps, scale, shift, add, silu)
    native.group_norm_silu(arguments, dense_out.data_ptr(), threads())
    if dense_out is not out:
        out.copy_(dense_out)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
    dadd: Tensor | None,
) -> None:
    """Write the gradients that are not None.

    grad: dL/dy, like x; dx: like x; dweight, dbias: float32 [C]; dscale, dshift, dadd: float32
    [N, C]. The statistics are computed again from x.
    """
    last = _channels_last(x)
    if last is None:
        last, x = False, x.contiguous()
    like = torch.empty_like(x) if grad.stride() != x.stride() or grad.dtype != x.dtype else grad
    if like is not grad:
        like.copy_(grad)
    dense_dx = dx if dx is None or dx.stride() == x.stride() else torch.empty_like(x)
    arguments, _kept = _arguments(x, last, weight, bias, groups, eps, scale, shift, add, silu)
    outputs = (dense_dx, dweight, dbias, dscale, dshift, dadd)
    dense = [v if v is None or v is dense_dx else v.contiguous() for v in outputs]
    native.group_norm_silu_backward(
        arguments, like.data_ptr(), *(0 if v is None else v.data_ptr() for v in dense), threads()
    )
    for wanted, written in zip((dx, *outputs[1:]), dense, strict=True):
        if wanted is not None and written is not None and written is not wanted:
            wanted.copy_(written)


def _channels_last(x: Tensor) -> bool | None:
    """Whether x is [N, S, C] in memory; False for [N, C, S], None for neither."""
    if x.is_contiguous():
        return False
    return True if x.movedim(1, -1).is_contiguous() else None


def _arguments(
    x: Tensor,
    channels_last: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The native arguments, and the tensors that must live as long as they are used."""
    samples, channels = x.shape[:2]
    spatial = x.numel() // (samples * channels)
    kept = tuple(_readable(v) for v in (weight, bias, scale, shift, add))
    native_arguments = native.GroupNorm(
        x.data_ptr(),
        DTYPES[x.dtype],
        channels_last or spatial == 1,
        samples,
        channels,
        spatial,
        groups,
        eps,
        *(_parameter(v) for v in kept),
        silu,
    )
    return native_arguments, kept


def _readable(value: Tensor | None) -> Tensor | None:
    """``value`` with neighbouring channels side by side, in a dtype the module reads."""
    if value is None:
        return None
    if value.dtype not in DTYPES:
        value = value.to(torch.float32)
    return value if value.stride(-1) == 1 else value.contiguous()


def _parameter(value: Tensor | None) -> Parameter:
    if value is None:
        return None
    stride = value.stride(0) if value.dim() == 2 else 0
    return value.data_ptr(), DTYPES[value.dtype], stride
