"""GroupNorm (Wu & He 2018, eq. 1) with AdaGN modulation (ADM section 3.1) and SiLU, as written."""

from __future__ import annotations

import torch
from torch import Tensor


def formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
) -> Tensor:
    """act((1 + scale) GN(x + add) + shift) in float32, or float64 for float64 input.

    x: [N, C, ...]; weight, bias: [C]; scale, shift, add: [N, C].
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    spatial = [1] * (x.dim() - 2)
    h = x.to(dtype)
    if add is not None:
        h = h + add.to(dtype).view(*add.shape, *spatial)
    grouped = h.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(dim=-1, keepdim=True)
    centred = grouped - mean
    variance = centred.square().mean(dim=-1, keepdim=True)
    h = (centred * torch.rsqrt(variance + eps)).view(x.shape)
    if weight is not None:
        h = h * weight.to(dtype).view(-1, *spatial)
    if bias is not None:
        h = h + bias.to(dtype).view(-1, *spatial)
    if scale is not None:
        h = h * (1 + scale.to(dtype).view(*scale.shape, *spatial))
    if shift is not None:
        h = h + shift.to(dtype).view(*shift.shape, *spatial)
    return h * torch.sigmoid(h) if silu else h


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
    out.copy_(formula(x, weight, bias, groups, eps, scale, shift, add, silu))
