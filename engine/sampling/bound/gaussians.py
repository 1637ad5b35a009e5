"""What a variational bound is made of: divergences of normal distributions, and pixels' bins."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Cdf = Literal["exact", "tanh"]
LEAST_MASS = 1e-12  # of a bin: 39.86 bits


def normal_divergence(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)) in nats, elementwise."""
    return 0.5 * (
        other_log_variance
        - log_variance
        + (log_variance - other_log_variance).exp()
        + (mean - other_mean).square() * (-other_log_variance).exp()
        - 1
    )


def discretised_log_likelihood(x0: Tensor, mean: Tensor, std: Tensor, cdf: Cdf = "exact") -> Tensor:
    """log of the mass of N(mean, std^2) on the bin of each 8-bit pixel, in nats (DDPM, eq. 13).

    The bin of x0 in [-1, 1] is x0 +- 1/255, open to infinity at the two ends. ``cdf`` is the normal
    distribution itself ("exact") or guided-diffusion's approximation of it ("tanh"),
    (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2. Masses below 1e-12 count as 1e-12.
    """
    distribution = torch.special.ndtr if cdf == "exact" else _tanh_cdf
    upper = distribution((x0 + 1 / 255 - mean) / std)
    lower = distribution((x0 - 1 / 255 - mean) / std)
    upper = torch.where(x0 > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x0 < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=LEAST_MASS).log()


def _tanh_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
