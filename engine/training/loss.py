"""Training objectives: L_simple (DDPM, eq. 14) and L_hybrid (Nichol and Dhariwal 2021, eq. 16)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepfuse.engine.sampling.bound.gaussians import (
    discretised_log_likelihood,
    normal_divergence,
)
from stepfuse.engine.sampling.schedule import Schedule

HYBRID_LAMBDA = 1e-3


def simple_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, float32 [N]; prediction and target [N, C, H, W]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


class HybridLoss:
    """L_simple + lambda T L_vlb(t), per sample, for learned-range variance.

    L_vlb(t) is one term of the variational bound in bits per dimension,

    - i > 0: KL(N(mu~, beta~) || N(mu_theta, Sigma_theta)) / ln 2,
    - i = 0: -log2 P(x_0), the Gaussian integrated over each pixel's bin x +- 1/255,

    with log Sigma_theta = f log beta + (1 - f) log beta~, f = (v + 1) / 2, v the second half of the
    output. The factor T makes the expectation over t the sum over all terms. The mean is detached:
    the bound trains the variance alone (section 3.1 there).
    """

    def __init__(self, schedule: Schedule, weight: float = HYBRID_LAMBDA) -> None:
        betas, abar = schedule.betas, schedule.alphas_cumprod
        previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        posterior = betas * (1 - previous) / (1 - abar)
        clipped = torch.cat([posterior[1:2], posterior[1:]]) if len(betas) > 1 else betas
        self.weight = weight * schedule.num_train_timesteps
        self.log_beta = betas.log()
        self.log_posterior = clipped.log()
        self.sqrt_recip_abar = abar.rsqrt()
        self.sqrt_recipm1_abar = (1 / abar - 1).sqrt()
        self.c_x0 = previous.sqrt() * betas / (1 - abar)
        self.c_xt = (1 - betas).sqrt() * (1 - previous) / (1 - abar)

    def __call__(self, output: Tensor, noise: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Loss [N] of output [N, 2C, H, W] for noise, x0, x_t [N, C, H, W] and t [N]."""
        epsilon, v = output.float().chunk(2, dim=1)
        bound = self.bound(epsilon.detach(), v, x0, x_t, t)
        return simple_loss(epsilon, noise) + self.weight * bound

    def bound(self, epsilon: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """L_vlb(t) in bits per dimension, [N]."""

        def at(table: Tensor) -> Tensor:
            return table.to(t.device)[t].float().view(-1, 1, 1, 1)

        f = (v + 1) / 2
        log_variance = f * at(self.log_beta) + (1 - f) * at(self.log_posterior)
        x0_hat = at(self.sqrt_recip_abar) * x_t - at(self.sqrt_recipm1_abar) * epsilon
        mean = at(self.c_x0) * x0_hat + at(self.c_xt) * x_t
        true_mean = at(self.c_x0) * x0 + at(self.c_xt) * x_t
        log_true = at(self.log_posterior)
        divergence = normal_divergence(true_mean, log_true, mean, log_variance)
        decoder = -discretised_log_likelihood(x0, mean, (0.5 * log_variance).exp())
        nats = torch.where(t.view(-1, 1, 1, 1) == 0, decoder, divergence)
        return nats.flatten(1).mean(dim=1) / math.log(2)
