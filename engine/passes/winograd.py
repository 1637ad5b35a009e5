"""3x3 convolution with fewer products than it has terms: an operator of the C++ module.

    y = A^T [ (G w G^T) * (B^T d B) ] A        square, F(2x2, 3x3): 16 products for 4 pixels, not 36
    y = A^T [ (G w) * (B^T d) ]                lines, F(2, 3): 4 for 2, in each of 3 rows, not 6

Winograd's minimal filtering (Lavin and Gray 2016, sections 4.1 and 4.2), "*" being a matrix product
over channels at each frequency; d are the 4 pixels of an axis that a pair of results y depends on:

    B^T = 1  0 -1  0     G =  1    0    0      A^T = 1  1  1  0
          0  1  1  0         1/2  1/2  1/2           0  1 -1 -1
          0 -1  1  0         1/2 -1/2  1/2
          0  1  0 -1          0    0    1

In float32 it rounds like the direct sum. In bfloat16 the transformed image is rounded again, and
the sums of its pixels and of the filters weigh more than the results they cancel to: the error of a
layer grows by about 1.4 (lines) and 1.7 (square). An infinite pixel makes its neighbours NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels.registration import define, eager

native: Any
try:
    from stepfuse.kernels.cpp.module import DTYPES, native, threads
except ImportError:  # installed without a C++ compiler
    native = None

_G = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64) / 2


def why_not(dtype: torch.dtype) -> str:
    """Why the operator cannot run here in this dtype; empty where it can."""
    if native is None:
        return "no C++ module"
    if dtype is torch.bfloat16 and not native.winograd_bfloat16:
        return "no dot products of bfloat16"
    return "" if dtype in (torch.float32, torch.bfloat16) else f"not for {dtype}"


def fits(shape: torch.Size, channels_out: int, square: bool) -> bool:
    """Whether images of ``shape`` divide into tiles, and channels into vectors."""
    _, channels, height, width = shape
    wide = native.winograd_wide
    return not (channels % wide or channels_out % wide or width % 2 or (square and height % 2))


def filters(weight: Tensor, square: bool, dtype: torch.dtype) -> Tensor:
    """G w G^T (or G w) of w [K, C, 3, 3], computed in float64 and rounded once, as the operator
    takes it: [K / wide, frequencies, taps, C, wide], in bfloat16 with pairs of C side by side.
    """
    wide = native.winograd_wide
    result: Tensor | None = None
    # part by part: float64 of all of them would be a peak of memory
    for first in range(0, len(weight), wide):
        part = _filters(weight[first : first + wide], square, dtype)
        if result is None:
            result = part.new_empty(len(weight) // wide, *part.shape[1:])
        result[first // wide] = part[0]
    assert result is not None
    return result


def _filters(weight: Tensor, square: bool, dtype: torch.dtype) -> Tensor:
    k, c = weight.shape[:2]
    wide, together = native.winograd_wide, 2 if dtype is torch.bfloat16 else 1
    if square:
        u = torch.einsum("ai,bj,kcij->bakc", _G, _G, weight.double()).reshape(16, 1, k, c)
    else:
        u = torch.einsum("fj,kcij->fikc", _G, weight.double())
    u = u.to(dtype).view(*u.shape[:2], k // wide, wide, c // together, together)
    return u.permute(2, 0, 1, 4, 3, 5).contiguous()


def _run(
    x: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None, square: bool
) -> Tensor:
    image = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = image.shape
    k = u.shape[0] * native.winograd_wide
    if x.dtype != u.dtype or u.numel() != k * c * (16 if square else 12):
        raise ValueError(f"{x.dtype} {list(x.shape)} does not fit filters {list(u.shape)}")
    out = torch.empty((n, k, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    addend = None
    if residual is not None:
        addend = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    offset = None if bias is None else bias.to(torch.float32).contiguous()
    native.winograd(
        image.data_ptr(),
        u.data_ptr(),
        0 if offset is None else offset.data_ptr(),
        0 if addend is None else addend.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        *(n, h, w, c, k),
        square,
        threads(),
    )
    return out


def _fake(
    x: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None, square: bool
) -> Tensor:
    channels_out = u.shape[0] * u.shape[4]
    out = x.new_empty((x.shape[0], channels_out, *x.shape[2:]))
    return out.contiguous(memory_format=torch.channels_last)


# conv2d(x, w, bias, padding=1) + residual for x [N, C, H, W] of float32 or bfloat16; channels-last
winograd = define(
    "winograd(Tensor x, Tensor u, Tensor? bias, Tensor? residual, bool square) -> Tensor",
    _run,
    _fake,
)


def convolve(
    x: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None, square: bool
) -> Tensor:
    """`winograd`, which skips the dispatcher where nobody watches it."""
    call = _run if eager(x, residual) else winograd
    y: Tensor = call(x, u, bias, residual, square)
    return y
