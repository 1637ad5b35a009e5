"""guided-diffusion's `calc_bpd_loop`, from its equations: a loop over the timesteps of one batch.

Its prior, its KL of the posteriors, its decoder with the tanh distribution and its clipped x0, in
the dtype of x0, with the tables of a chain of its own betas. Nothing of stepfuse is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """[N, S] each, in the order of the timesteps; ``prior`` is [N]."""

    prior: Tensor
    bits: Tensor
    x0_mse: Tensor
    eps_mse: Tensor


def calc_bpd_loop(
    model: Callable[[Tensor, Tensor], Tensor],
    abar_of_training: Tensor,
    timesteps: Sequence[int],
    x0: Tensor,
    noises: Sequence[Tensor],
    variance_type: str,
    clip: bool = True,
) -> Terms:
    """Down ``timesteps``; ``noises[i]`` is that of the i-th. ``model`` predicts epsilon."""
    up = list(reversed(timesteps))
    abar = abar_of_training[up]
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    betas = 1 - abar / before
    posterior = betas * (1 - before) / (1 - abar)
    log_clipped = torch.cat([posterior[1:2], posterior[1:]]).log()
    x0_weight = betas * before.sqrt() / (1 - abar)
    x_weight = (1 - before) * (1 - betas).sqrt() / (1 - abar)
    large = torch.cat([posterior[1:2], betas[1:]]).log()

    def flat(x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)

    def bits_of(x0: Tensor, x_t: Tensor, out: Tensor, i: int) -> tuple[Tensor, Tensor]:
        eps, extra = out[:, : x0.shape[1]], out[:, x0.shape[1] :]
        log_variance = {"fixed_small": log_clipped[i], "fixed_large": large[i]}.get(variance_type)
        if variance_type == "learned":
            log_variance = extra
        elif variance_type == "learned_range":
            f = (extra + 1) / 2
            log_variance = f * betas[i].log() + (1 - f) * log_clipped[i]
        assert log_variance is not None
        guess = (1 / abar[i]).sqrt() * x_t - (1 / abar[i] - 1).sqrt() * eps
        if clip:
            guess = guess.clamp(-1, 1)
        mean = x0_weight[i] * guess + x_weight[i] * x_t
        true = x0_weight[i] * x0 + x_weight[i] * x_t
        if i:
            ratio = (log_clipped[i] - log_variance).exp()
            distance = (true - mean) ** 2 * (-log_variance).exp()
            nats = 0.5 * (-1 + log_variance - log_clipped[i] + ratio + distance)
        else:
            nats = -decoder(x0, mean, 0.5 * log_variance)
        return flat(nats * torch.ones_like(x0)) / math.log(2), guess

    bits, x0_mse, eps_mse = [], [], []
    for noise, t, i in zip(noises, timesteps, reversed(range(len(up))), strict=True):
        x_t = (abar[i].sqrt() * x0 + (1 - abar[i]).sqrt() * noise).to(x0.dtype)
        out = model(x_t, torch.full((len(x0),), t))
        term, guess = bits_of(x0, x_t, out, i)
        bits.append(term)
        x0_mse.append(flat((guess - x0) ** 2))
        eps = ((1 / abar[i]).sqrt() * x_t - guess) / (1 / abar[i] - 1).sqrt()
        eps_mse.append(flat((eps - noise) ** 2))
    last = abar[-1]
    prior = 0.5 * (-1 - (1 - last).log() + (1 - last) + last * x0**2)
    return Terms(
        flat(prior) / math.log(2),
        torch.stack(bits, 1),
        torch.stack(x0_mse, 1),
        torch.stack(eps_mse, 1),
    )


def decoder(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Their log likelihood of a pixel's bin, with their approximation of the distribution."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scale = (-log_std).exp()
    above, below = cdf(scale * (x0 - mean + 1 / 255)), cdf(scale * (x0 - mean - 1 / 255))
    inner = (above - below).clamp(min=1e-12).log()
    ends = torch.where(x0 > 0.999, (1 - below).clamp(min=1e-12).log(), inner)
    return torch.where(x0 < -0.999, above.clamp(min=1e-12).log(), ends)
