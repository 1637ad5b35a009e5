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
    """Write the gradients into the tensors given; None skips one. Statistics are recomputed.

    With h = x + add, n = (h - mean) rstd, a = weight n + bias and m = (1 + scale) a + shift,

        dm     = grad silu'(m)            silu'(m) = s (1 + m (1 - s)), s = sigmoid(m); 1 without
        dshift = sum_hw dm                dscale   = sum_hw dm a
        da     = (1 + scale) dm
        dbias  = sum_n,hw da              dweight  = sum_n,hw da n
        dn     = weight da
        dh     = rstd (dn - <dn> - n <dn n>)         <.> the mean over a group
        dx     = dh                       dadd     = sum_hw dh

    dh is what is left of rstd dn once its components along 1 and n are gone: mean and variance
    take out the shift and the scale of h, so that neither can move the result (eps aside, which
    rstd contains). dx: like x; dweight, dbias: [C]; dscale, dshift, dadd: [N, C].
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    count, channels = x.shape[:2]

    def column(v: Tensor | None) -> Tensor | float:
        return 0.0 if v is None else v.to(dtype).reshape(-1, channels, 1)

    h = x.to(dtype).reshape(count, channels, -1) + column(add)
    grouped = h.reshape(count, groups, -1)
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    n = centred * rstd
    gain = 1.0 if weight is None else column(weight)
    a = n.view(h.shape) * gain + column(bias)
    m = a * (1 + column(scale)) + column(shift)
    dm = grad.to(dtype).reshape(h.shape)
    if silu:
        s = torch.sigmoid(m)
        dm = dm * s * (1 + m * (1 - s))
    da = dm * (1 + column(scale))
    dn = (da * gain).reshape(grouped.shape)
    projected = dn.mean(dim=-1, keepdim=True) + n * (dn * n).mean(dim=-1, keepdim=True)
    dh = (rstd * (dn - projected)).view(h.shape)
    for target, value in (
        (dx, dh),
        (dweight, (da * n.view(h.shape)).sum(dim=(0, 2))),
        (dbias, da.sum(dim=(0, 2))),
        (dscale, (dm * a).sum(dim=2)),
        (dshift, dm.sum(dim=2)),
        (dadd, dh.sum(dim=2)),
    ):
        if target is not None:
            target.copy_(value.view(target.shape))
