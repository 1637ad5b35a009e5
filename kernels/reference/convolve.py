"""A convolution or linear layer with the GroupNorm before it and the residual after it, as written.

The weight is the one that the layer has. `stepfuse.kernels.convolve` and the C++ take it packed
(`stepfuse.kernels.filters`), transformed for the form in which the layer is computed: a matter of
how many multiplications there are, of which the formula knows nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepfuse.kernels.reference import group_norm_silu


def formula(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    form: str,
    stride: int,
    groups: int,
    eps: float,
    weight: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    beside: Tensor | None = None,
) -> Tensor:
    """conv(act(norm([x, beside])), w) + bias + residual in float32, or float64 for float64 input.

    x, beside: [N, C, H, W] and w: [K, C, 3, 3] or [K, C, 1, 1], or x: [N, L, C] and w: [K, C];
    bias: [K]; residual: like the result. The norm is that of `group_norm_silu`, none with 0
    groups; weight, offset: [C]; scale, shift, add: [N, C]. Of the forms only "enlarged" is another
    formula: the convolution of the image enlarged twice by nearest neighbours.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    image = x if beside is None else torch.cat([x, beside], dim=1)
    tokens = image.dim() == 3
    if tokens:
        image = image.transpose(1, 2)
    image = image.to(dtype)
    if groups:
        parameters = (weight, offset, groups, eps, scale, shift, add, silu)
        image = group_norm_silu.formula(image, *parameters)
    if form == "enlarged":
        image = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    w, b = w.to(dtype), None if bias is None else bias.to(dtype)
    if tokens:
        y = F.linear(image.transpose(1, 2), w.flatten(1), b)
    else:
        w = w.view(*w.shape[:2], 1, 1) if w.dim() == 2 else w
        y = F.conv2d(image, w, b, stride, padding=w.shape[2] // 2)
    return y if residual is None else y + residual.to(dtype)
