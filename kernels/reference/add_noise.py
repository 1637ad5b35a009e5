"""x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, as written (DDPM eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.reference import philox


def coefficients(
    t: Tensor, alphas_cumprod: Tensor, dims: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(sqrt(abar_t), sqrt(1 - abar_t)), each [N, 1, ...] with ``dims`` dimensions.

    NaN where t is outside 0 .. T-1, which on a GPU would end every later call, too.
    """
    there = t.clamp(0, len(alphas_cumprod) - 1)
    abar = torch.where(t == there, alphas_cumprod[there], torch.nan).view(-1, *[1] * (dims - 1))
    return abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)


def run(
    x0: Tensor,
    noise: Tensor | None,
    t: Tensor,
    alphas_cumprod: Tensor,
    seed: Tensor | None,
    sample: Tensor | None,
    out: Tensor,
    target: Tensor | None,
    velocity: bool,
) -> None:
    """Write x_t into ``out`` and, where ``target`` is given, eps or v into it.

    x0, noise, out, target: [N, ...] of one dtype; t: int64 [N]; alphas_cumprod: float64 [T];
    seed, sample: int64 [N], used where ``noise`` is None.
    """
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    signal, sigma = coefficients(t, alphas_cumprod, x0.dim(), dtype)
    if noise is None:
        assert seed is not None
        assert sample is not None
        eps = philox.normal(seed, sample, t, x0[0].numel()).view(x0.shape).to(dtype)
    else:
        eps = noise.to(dtype)
    x = x0.to(dtype)
    x_t, v = signal * x + sigma * eps, signal * eps - sigma * x
    # only now is anything written: ``out`` may be x0 or noise, and so may ``target``
    if target is not None:
        target.copy_(v if velocity else eps)
    out.copy_(x_t)
