"""GroupNorm, modulation and SiLU by the C++ module; the contract is that of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.cpp.module import DTYPES, native, threads

_NONE = (0, 0, 0)  # address, dtype code, elements from sample to sample


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
    dense, dense_out = x, out
    if x.is_contiguous() and out.is_contiguous():
        last = False
    elif _channels_last(x) and _channels_last(out):
        last = True
    else:
        last, dense, dense_out = False, x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    values, kept = arguments(dense, last, groups, silu, (weight, bias, scale, shift, add))
    native.group_norm_silu(values, eps, dense_out.data_ptr(), threads())
    del kept
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
    last = not x.is_contiguous() and _channels_last(x)
    dense = x if last else x.contiguous()
    dense_grad = grad
    if grad.stride() != dense.stride() or grad.dtype != x.dtype:
        dense_grad = torch.empty_like(dense).copy_(grad)
    outputs = (dx, dweight, dbias, dscale, dshift, dadd)
    written = [v if v is None or v.is_contiguous() else v.contiguous() for v in outputs]
    if dx is not None:
        written[0] = dx if dx.stride() == dense.stride() else torch.empty_like(dense)
    values, kept = arguments(dense, last, groups, silu, (weight, bias, scale, shift, add))
    native.group_norm_silu_backward(
        values,
        eps,
        dense_grad.data_ptr(),
        *(0 if v is None else v.data_ptr() for v in written),
        threads(),
    )
    del kept
    for wanted, source in zip(outputs, written, strict=True):
        if wanted is not None and source is not None and source is not wanted:
            wanted.copy_(source)


def _channels_last(x: Tensor) -> bool:
    """Whether x is [N, S, C] in memory."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def arguments(
    x: Tensor,
    channels_last: bool,
    groups: int,
    silu: bool,
    parameters: tuple[Tensor | None, ...],
) -> tuple[list[int], list[Tensor]]:
    """What the module wants to know of x and of weight, bias, scale, shift and add, one number
    after the other, and the copies that must live while it runs.
    """
    shape = x.shape
    samples, channels = shape[0], shape[1]
    spatial = x.numel() // max(1, samples * channels)
    last = channels_last or spatial == 1
    values = [x.data_ptr(), DTYPES[x.dtype], last, samples, channels, spatial, groups, silu]
    kept = []
    for value in parameters:
        if value is None:
            values += _NONE
            continue
        code, strides = DTYPES.get(value.dtype), value.stride()
        if code is None or strides[-1] != 1:
            value = value.to(torch.float32).contiguous()
            code, strides = DTYPES[value.dtype], value.stride()
            kept.append(value)
        values += (value.data_ptr(), code, strides[0])
    return values, kept
