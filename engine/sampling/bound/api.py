"""`stepfuse.bits_per_dim`: the likelihood of images under a diffusion model, bounded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.engine.sampling.bound.bounding import Bounding
from stepfuse.engine.sampling.bound.gaussians import Cdf
from stepfuse.engine.sampling.bound.result import Bound
from stepfuse.engine.sampling.denoiser import Condition, Model
from stepfuse.engine.sampling.program_cache import GraphMode
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.update import PredictionType, VarianceAtZero, VarianceType
from stepfuse.kernels.checks import check_flag

PLENTY = 20.0  # bits/dim, far more than the 8 that the image has


def bits_per_dim(
    model: Model,
    schedule: Schedule,
    x0: Tensor,
    *,
    condition: Condition | None = None,
    timesteps: Sequence[int] | None = None,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_large",
    variance_at_zero: VarianceAtZero = "next",
    clip_sample: float | None = 1.0,
    cdf: Cdf = "exact",
    seed: int | Tensor = 0,
    first_index: int | Tensor = 0,
    noise: Tensor | None = None,
    batch_size: int = 32,
    progress: bool = False,
    backend: str = "auto",
    graph: GraphMode | None = "auto",
    optimize: bool | torch.dtype = False,
    device: torch.device | str | None = None,
) -> Bound:
    """The variational bound on the negative log likelihood of 8-bit images, in bits/dim.

        L = L_T + sum_t L_{t-1} + L_0                     DDPM (Ho et al. 2020), eq. 5
        L_T     = KL(q(x_T | x0) || N(0, I))
        L_{t-1} = KL(q(x_s | x_t, x0) || p(x_s | x_t))    from every timestep to the next one, s
        L_0     = -log P(x0 | x_t): N(x0_hat, sigma^2) on the bin x0 +- 1/255 of each pixel, open
                  at the two ends (eq. 13)

    each with one draw of x_t from q(x_t | x0), divided by D ln 2 for D = C H W values a sample. The
    terms do not depend on each other: any ``batch_size`` pairs of samples and timesteps are one
    evaluation of the model, by one captured step. A sample's result depends on (seed, first_index +
    n) and its condition alone, as far as the model's own arithmetic does not depend on its batch.

    Args:
        model, schedule, prediction_type, variance_at_zero, backend, graph, optimize, device: see
            `Sampler`. ``graph="loop"`` means "step".
        x0: images, uint8 [N, C, ...], or float32 or float64 in [-1, 1]: u / 127.5 - 1 for whole
            numbers u. Float64 noises them in float64, too; sums are always float64.
        condition: see `Sampler.sample`.
        timesteps: the chain, descending; None for every timestep of the schedule. Fewer make
            another chain, with the betas 1 - abar_t / abar_s and another bound.
        variance_type: of p: "fixed_large" (beta), "fixed_small" (beta~, whose terms explode where
            the steps are large), or of the model, "learned" or "learned_range". The second half of
            2C channels is not used with a fixed one. The step to x0 has the variance of the one
            before it.
        clip_sample: clip x0_hat to +-this before the terms are taken; None for no clipping.
        cdf: of L_0: the normal distribution ("exact") or guided-diffusion's "tanh".
        seed, first_index: of the noise, which is that of `Sampler` for the same timestep.
        noise: [S, N, C, ...] to use instead; row i at ``timesteps[i]``.
        batch_size: pairs at a time.
        progress: show a progress bar.

    Warns where the mean exceeds 20 bits/dim. Raises ValueError or TypeError, before the model runs,
    for images that are not of 8 bits, timesteps that make no chain, a schedule whose abar is 0
    where the model predicts epsilon, and whatever else does not fit together.

    >>> b = bits_per_dim(ckpt.model, ckpt.schedule, images, condition={"labels": labels})
    >>> b.total.mean(), b.rate_distortion().rmse
    """
    check_flag("progress", progress)
    bounding = Bounding(
        model,
        schedule,
        x0,
        condition=condition,
        timesteps=timesteps,
        prediction_type=prediction_type,
        variance_type=variance_type,
        variance_at_zero=variance_at_zero,
        clip_sample=clip_sample,
        cdf=cdf,
        seed=seed,
        first_index=first_index,
        noise=noise,
        batch_size=batch_size,
        backend=backend,
        graph=graph,
        optimize=optimize,
        device=device,
    )
    bound = bounding.bound(progress)
    if (remark := too_much(bound, variance_type)) is not None:
        warnings.warn(remark, stacklevel=2)
    return bound


def too_much(bound: Bound, variance_type: VarianceType) -> str | None:
    """A remark on a mean above 20 bits/dim; None below."""
    mean = float(bound.total.mean())
    if mean <= PLENTY:
        return None
    remedy = "more timesteps"
    if variance_type == "fixed_small":  # whose terms grow with beta / beta~
        remedy += " or variance_type='fixed_large'"
    steps = len(bound.timesteps)
    return f"{mean:.4g} bits/dim over {steps} timesteps: {remedy} will give a tighter bound"
