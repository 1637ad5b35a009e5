"""GroupNorm, AdaGN modulation and SiLU in one pass over the activation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepfuse.kernels.backends import implementation, resolve
from stepfuse.kernels.checks import check_float, check_like
from stepfuse.kernels.reference.group_norm_silu import formula


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    act: Literal["silu", "none"] = "silu",
    backend: str = "auto",
) -> Tensor:
    """Normalise groups of channels, modulate, activate.

        h = x + add
        h = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias      mean, var over a group
        y = act((1 + scale) h + shift)

    GroupNorm is Wu & He 2018, section 3; the modulation is AdaGN, Dhariwal & Nichol 2021,
    section 3.1; ``add`` is the time-embedding bias of DDPM's residual block (appendix B).

    Args:
        x: [N, C, ...] with any number of spatial dimensions, float32, bfloat16, float16 or float64;
            channels-first or channels-last in memory, and y is laid out alike.
        weight, bias: [C], or None for 1 and 0.
        groups: a divisor of C.
        eps: added to the variance, > 0.
        scale, shift, add: [N, C], or None for 0.
        act: "silu" (y = h sigmoid(h)) or "none".
        backend: "auto", "reference", "cpp" or "triton".

    Returns y, of the shape and dtype of x. Statistics and arithmetic are float32 (float64 for
    float64 input). Differentiable in every tensor.

    Raises ValueError or TypeError for arguments that do not fit together, `BackendUnavailable`
    where ``backend`` cannot run them.
    """
    _check(x, weight, bias, groups, eps, scale, shift, add, act)
    silu = act == "silu"
    tensors = (x, weight, bias, scale, shift, add)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        return formula(x, weight, bias, groups, eps, scale, shift, add, silu).to(x.dtype)
    out = torch.empty_like(x)
    run = implementation("group_norm_silu", resolve(backend, x.device, x.dtype)).run
    run(x, weight, bias, groups, eps, scale, shift, add, silu, out)
    return out


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    act: str,
) -> None:
    check_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, C, ...]; got {tuple(x.shape)}")
    count, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels; got {groups}")
    if not eps > 0:
        raise ValueError(f"eps must be positive; got {eps}")
    if act not in ("silu", "none"):
        raise ValueError(f'act must be "silu" or "none"; got {act!r}')
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_like(name, tensor, (channels,), x)
    for name, tensor in (("scale", scale), ("shift", shift), ("add", add)):
        if tensor is not None:
            check_like(name, tensor, (count, channels), x)
