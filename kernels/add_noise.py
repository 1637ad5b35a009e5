"""The forward process: data to data-with-noise at any timestep, in one pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepfuse.kernels.backends import implementation, resolve
from stepfuse.kernels.checks import check_float, check_like, per_sample, sample_indices

Target = Literal["epsilon", "v_prediction"]


def add_noise(
    x0: Tensor,
    noise: Tensor | None,
    t: int | Tensor,
    alphas_cumprod: Tensor,
    *,
    target: Target | None = None,
    seed: int | Tensor | None = None,
    sample: int | Tensor = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Noise x0 to timestep t, and give the training target beside it.

        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps          DDPM (Ho et al. 2020), eq. 4
        v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x0          Salimans & Ho 2022, section 4

    Args:
        x0: [N, ...], float32, bfloat16, float16 or float64.
        noise: eps, of the shape of x0; None draws it inside (see ``seed``).
        t: index on the training schedule, one int or int64 [N].
        alphas_cumprod: [T]; float64 on x0's device costs no conversion.
        target: None, "epsilon" (the noise that was added) or "v_prediction".
        seed, sample: with ``noise=None``, the Philox seed (int or int64 [N]) and the number of the
            first sample (or int64 [N]); the timestep is part of the counter.
        inplace: write x_t over x0.
        backend: "auto", "reference", "cpp" or "triton".

    Returns x_t, or (x_t, target). Indices outside 0 .. T-1 raise IndexError on the CPU.
    """
    check_float("x0", x0)
    if x0.dim() < 1 or x0.numel() == 0:
        raise ValueError(f"x0 must hold at least one sample; got shape {tuple(x0.shape)}")
    if target not in (None, "epsilon", "v_prediction"):
        raise ValueError(f'target must be None, "epsilon" or "v_prediction"; got {target!r}')
    if (noise is None) == (seed is None):
        raise ValueError("give either noise or seed: noise=None draws it and needs a seed")
    count = x0.shape[0]
    t = per_sample("t", t, count, x0.device)
    if t.device.type == "cpu" and not 0 <= int(t.min()) <= int(t.max()) < len(alphas_cumprod):
        raise IndexError(
            f"t must be in 0 .. {len(alphas_cumprod) - 1}; got {int(t.min())} .. {int(t.max())}"
        )
    seeds = samples = None
    if noise is not None:
        check_like("noise", noise, x0.shape, x0)
        noise = noise.to(x0.dtype)
    elif seed is not None:
        seeds = per_sample("seed", seed, count, x0.device)
        samples = sample_indices(sample, count, x0.device)
    if torch.is_grad_enabled() and (x0.requires_grad or (noise is not None and noise.requires_grad)):
        raise ValueError("add_noise is not differentiable yet; call it under torch.no_grad()")
    out = x0 if inplace else torch.empty_like(x0)
    target_out = None if target is None else torch.empty_like(x0)
    abar = alphas_cumprod.to(device=x0.device, dtype=torch.float64)
    run = implementation("add_noise", resolve(backend, x0.device, x0.dtype)).run
    run(x0, noise, t, abar, seeds, samples, out, target_out, target == "v_prediction")
    return out if target_out is None else (out, target_out)
