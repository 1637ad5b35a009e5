"""`stepfuse.bits_per_dim`: the likelihood of images under a diffusion model, bounded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, empty
from tqdm.auto import tqdm

from stepfuse.engine.sampling.bound.chain import Chain
from stepfuse.engine.sampling.bound.gaussians import Cdf
from stepfuse.engine.sampling.bound.program import BoundProgram
from stepfuse.engine.sampling.bound.result import LEVELS, Bound
from stepfuse.engine.sampling.bound.walk import Walk
from stepfuse.engine.sampling.denoiser import Condition, Denoiser, Model, optimized
from stepfuse.engine.sampling.program_cache import GraphMode, check_graph
from stepfuse.engine.sampling.request import Request, check_images
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import check_timesteps
from stepfuse.engine.sampling.update import (
    PredictionType,
    Update,
    VarianceAtZero,
    VarianceType,
)
from stepfuse.kernels.arguments import check_kind, check_literal, check_values
from stepfuse.kernels.backends import resolve
from stepfuse.kernels.checks import as_integer, check_flag

PLENTY = 20.0  # bits/dim, far more than the 8 that the image has
_OFF_GRID = 1e-3  # grey levels: float32 is off by 1e-5


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
    batch_size: int = 64,
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
    check_kind("schedule", schedule, Schedule, "a Schedule, Schedule.linear() say")
    check_flag("progress", progress)
    check_graph(graph)
    check_literal("cdf", cdf, Cdf)
    pairs = as_integer("batch_size", batch_size)
    if pairs < 1:
        raise ValueError(f"batch_size must be at least 1; got {pairs}")
    update = Update(
        "ddpm",
        prediction_type=prediction_type,
        variance_type=variance_type,
        variance_at_zero=variance_at_zero,
        clip_sample=clip_sample,
    )
    total = schedule.num_train_timesteps
    steps = range(total - 1, -1, -1) if timesteps is None else timesteps
    chain = Chain.of(schedule, check_timesteps(steps, total), update)
    denoiser = Denoiser(optimized(model, optimize, 2))
    x0 = _eight_bits(x0).to(denoiser.place(device))
    request = Request(
        chain.timesteps,
        schedule.alphas_cumprod,
        x0.device,
        x0.dtype,
        resolve(backend, x0.device, x0.dtype),
        None,
        x0.shape,
        seed,
        first_index,
        condition,
        noise=noise,
    )
    denoiser.check_labels(request.condition)
    walk = Walk(
        denoiser,
        chain,
        schedule.alphas_cumprod,
        request,
        x0,
        pairs,
        cdf,
        request.backend,
        graph,
    )
    bound = _bound(walk, chain, x0, progress)
    mean = float(bound.total.mean())
    if mean > PLENTY:
        warnings.warn(_too_much(mean, len(chain.timesteps), variance_type), stacklevel=2)
    return bound


def _bound(walk: Walk, chain: Chain, x0: Tensor, progress: bool) -> Bound:
    bits = empty(walk.count, dtype=torch.float64, device=x0.device)
    x0_mse = empty(walk.count, dtype=torch.float64, device=x0.device)

    with tqdm(total=walk.count, unit=" terms", unit_scale=True, disable=not progress) as bar:

        def take(cut: slice, program: BoundProgram) -> None:
            count = cut.stop - cut.start
            bits[cut].copy_(program.bits[:count])
            x0_mse[cut].copy_(program.x0_mse[:count])
            bar.update(count)

        walk.run(take)
    shape = (len(chain.timesteps), len(x0))
    squares = x0_mse.view(shape).T.cpu().contiguous()
    return Bound(
        chain.timesteps,
        chain.prior(x0).cpu(),
        bits.view(shape).T.cpu().contiguous(),
        squares,
        squares * chain.snr,
    )


def _too_much(mean: float, steps: int, variance_type: str) -> str:
    remedy = "more timesteps"
    if variance_type == "fixed_small":  # whose terms grow with beta / beta~
        remedy += " or variance_type='fixed_large'"
    return f"{mean:.4g} bits/dim over {steps} timesteps: {remedy} will give a tighter bound"


def _eight_bits(x0: Tensor) -> Tensor:
    """Images in [-1, 1] of uint8 ones, or of floats that are on their grid."""
    check_values("x0", x0)
    if x0.dtype == torch.uint8:
        x0 = x0.to(torch.float64).div_(LEVELS).sub_(1).to(torch.float32)
    elif x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x0 must be one of uint8, float32, float64; got {x0.dtype}")
    check_images("x0", x0)
    x0 = x0.detach()
    levels = (x0.double() + 1) * LEVELS
    off = ~((levels - levels.round()).abs() <= _OFF_GRID)  # so written, NaN is off
    off |= (levels < -_OFF_GRID) | (levels > 2 * LEVELS + _OFF_GRID)
    if bool(off.any()):
        raise ValueError(
            "x0 must hold 8-bit images, u / 127.5 - 1 for whole u in 0 .. 255: the decoder gives "
            f"probabilities of such levels alone; got {float(x0[off][0]):.6g}, which is "
            f"u = {float(levels[off][0]):.6g}"
        )
    return x0
