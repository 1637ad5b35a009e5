"""Images, weights and norms for the tests of the convolution, and what it should give for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from op_cases import in_threads
from torch import Tensor

from stepfuse.kernels.convolve import ConvolveCall, convolve
from stepfuse.kernels.filters import Form
from stepfuse.kernels.reference import convolve as reference

NORMS = ("no norm", "norm", "everything")


def weight_for(form: Form, channels_out: int, channels: int) -> Tensor:
    kernel = (1, 1) if form == "dense" else (3, 3)
    return torch.randn(channels_out, channels, *kernel) / channels**0.5


def norm_of(kind: str, n: int, c: int) -> dict[str, Any]:
    """The operator's arguments for a norm."""
    if kind == "no norm":
        return {}
    affine = {"weight": torch.randn(c), "offset": torch.randn(c)}
    if kind == "norm":
        return {"groups": 4, "eps": 1e-3, **affine}
    scale, shift, add = (torch.randn(n, c) for _ in range(3))
    return {"groups": 8, **affine, "scale": scale, "shift": shift, "add": add, "silu": True}


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels-last, of a mean that is not zero: borders of a normalised one differ from pixels."""
    x = (2 * torch.randn(shape) + 1).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def oracle(call: ConvolveCall, weight: Tensor) -> Tensor:
    """What ``call`` should give for the filters of ``weight``, in float64."""
    wide = (v.double() if isinstance(v, Tensor) else v for v in call.arguments())
    return reference.formula(*replace(ConvolveCall.of(list(wide)), u=weight.double()).arguments())


def run(call: ConvolveCall, threads: int = 1) -> Tensor:
    with in_threads(threads):
        return convolve(*call.arguments())


def by_pytorch(call: ConvolveCall, w: Tensor) -> Tensor:
    """The layers that the operator stands for."""
    x = call.x if call.x.dim() == 4 else call.x.mT
    if call.beside is not None:
        x = torch.cat([x, call.beside], 1)
    spread = (..., None, None) if x.dim() == 4 else (..., None)
    if call.add is not None:
        x = x + call.add[spread]
    if call.groups:
        x = F.group_norm(x, call.groups, call.weight, call.offset, call.eps)
    if call.scale is not None:
        x = x * (1 + call.scale[spread])
    if call.shift is not None:
        x = x + call.shift[spread]
    if call.silu:
        x = F.silu(x)
    if call.form == "enlarged":
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if x.dim() == 3:
        return F.linear(x.mT, w.flatten(1), call.bias) + call.residual
    return F.conv2d(x, w, call.bias, call.stride, w.shape[2] // 2) + call.residual
