"""Sampling as the papers write it: nothing folded, nothing fused, nothing captured.

The reference that `Sampler` and the benchmarks are compared with, to be read beside Ho et al. 2020
(DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (learned variances), Salimans & Ho 2022 (v),
Xiao et al. 2022 (DDGAN) and Ho & Salimans 2022 (guidance). It shares no formula with the step
table. a = abar_t is where a step starts, b = abar_s where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.sampling.schedule import Schedule

METHODS = ("ddim", "ddim_hat", "ddpm", "ddgan")
TINY = 1e-20  # the variance that stands for 0 before a logarithm is taken


def plain_loop(
    model: Callable[..., Tensor],
    schedule: Schedule,
    timesteps: Sequence[int],
    x: Tensor,
    noise: Callable[[int], Tensor] | None = None,
    condition: Mapping[str, Any] | None = None,
    *,
    scale: float = 1.0,
    unconditional: Mapping[str, Any] | None = None,
    final_alpha_one: bool = True,
    variance_at_zero: str = "next",
    **settings: Any,
) -> Tensor:
    """x_0 of ``x`` = x_T, [N, C, ...], down ``timesteps`` of the training schedule.

    Args:
        model: called as model(x, t, **condition) with t int64 [N].
        noise: gives z, like x, for the step from timestep t; zeros where there is none.
        scale, unconditional: classifier-free guidance, o_u + scale (o - o_u), o_u being the output
            for the condition with these entries.
        final_alpha_one, variance_at_zero, settings: see `Sampler`; ``method`` is "ddim",
            "ddim_hat", "ddpm" or "ddgan".

    Raises ValueError for another method.
    """
    if settings.get("method", "ddim") not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} for the plain loop; "
            f"got {settings['method']!r}"
        )
    condition = dict(condition or {})
    for leg in legs(schedule, timesteps, final_alpha_one, variance_at_zero):
        t = torch.full((len(x),), leg.t, device=x.device)
        out = model(x, t, **condition)
        if scale != 1:
            other = model(x, t, **{**condition, **(unconditional or {})})
            half = slice(x.shape[1])  # a learned variance stays that of the condition
            mixed = other[:, half] + scale * (out[:, half] - other[:, half])
            out = torch.cat([mixed, out[:, x.shape[1] :]], dim=1)
        z = torch.zeros_like(x) if noise is None else noise(leg.t)
        x = step(leg, x, out, z, **settings)
    return x


@dataclass(frozen=True)
class Leg:
    """From index t at a to b; ``before`` is abar_{t-1}, ``log_small`` the clipped log beta~."""

    t: int
    a: Tensor
    b: Tensor
    before: Tensor
    log_small: Tensor
    last: bool


def legs(
    schedule: Schedule,
    timesteps: Sequence[int],
    final_alpha_one: bool = True,
    at_zero: str = "next",
) -> list[Leg]:
    """Every transition of a descending list of timesteps."""
    abar = torch.cumprod(1 - schedule.betas, 0)
    one = torch.ones((), dtype=torch.float64)
    found: list[Leg] = []
    for i, t in enumerate(timesteps):
        last = i == len(timesteps) - 1
        end = one if last else abar[timesteps[i + 1]]
        small = (1 - end) / (1 - abar[t]) * (1 - abar[t] / end)
        log_small = small.clamp_min(TINY).log()
        if last and at_zero == "next" and found:
            log_small = found[-1].log_small
        b = abar[0] if last and not final_alpha_one else end
        found.append(Leg(t, abar[t], b, abar[t - 1] if t else one, log_small, last))
    return found


def predictions(leg: Leg, prediction_type: str, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps) that a model output means."""
    a = leg.a
    if prediction_type == "epsilon":
        return (x - (1 - a).sqrt() * out) / a.sqrt(), out
    if prediction_type == "v_prediction":
        return a.sqrt() * x - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * x
    if prediction_type == "sample":
        x0 = out
    else:
        beta = 1 - a / leg.before
        x0 = (out - (a / leg.before).sqrt() * (1 - leg.before) / (1 - a) * x) / (
            leg.before.sqrt() * beta / (1 - a)
        )
    return x0, (x - a.sqrt() * x0) / (1 - a).sqrt()


def step(
    leg: Leg,
    x: Tensor,
    out: Tensor,
    z: Tensor,
    *,
    method: str = "ddim",
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_sample: float | None = 1.0,
    rederive_epsilon: bool = True,
) -> Tensor:
    """x_s from x_t, the model output (2C channels for a learned variance) and normal noise z."""
    a, b = leg.a, leg.b
    out, extra = out[:, : x.shape[1]], out[:, x.shape[1] :]
    x0, eps = predictions(leg, prediction_type, x, out)
    if clip_sample is not None:
        x0 = x0.clamp(-clip_sample, clip_sample)
        if rederive_epsilon:
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    beta = 1 - a / b
    small = (1 - b) / (1 - a) * beta
    if method in ("ddim", "ddim_hat"):
        drift = small if method == "ddim_hat" else eta**2 * small
        noise = beta * (not leg.last) if method == "ddim_hat" else drift
        direction = (1 - b - drift).clamp_min(0).sqrt()
        return b.sqrt() * x0 + direction * eps + noise.sqrt() * z
    mean = b.sqrt() * beta / (1 - a) * x0 + (a / b).sqrt() * (1 - b) / (1 - a) * x
    if leg.last:
        return mean
    if method == "ddgan" or variance_type == "fixed_small":
        return mean + small.sqrt() * z
    if variance_type == "fixed_large":
        return mean + beta.sqrt() * z
    if variance_type == "learned":
        return mean + (extra / 2).exp() * z
    fraction = (extra + 1) / 2
    log_variance = fraction * beta.log() + (1 - fraction) * leg.log_small
    return mean + (log_variance / 2).exp() * z
