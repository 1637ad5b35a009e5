"""A model whose answers are known: the optimal denoiser of Gaussian data N(mean, std^2).

With a = abar_t, x = sqrt(a) x0 + sqrt(1-a) eps and x0 ~ N(mean, std^2) in every element,

    E[x0 | x] = (std^2 sqrt(a) x + (1-a) mean) / (a std^2 + 1-a)
    E[eps | x] = sqrt(1-a) (x - sqrt(a) mean) / (a std^2 + 1-a)

are affine in x, so that a sampler keeps Gaussians Gaussian, and their mean and standard deviation
can be followed in closed form from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfuse.engine.sampling.schedule import Schedule


@dataclass
class Gaussian:
    """Called as model(x, t): the optimal prediction, computed in float64, elementwise."""

    schedule: Schedule
    prediction_type: str = "epsilon"
    mean: float = 0.3
    std: float = 0.5

    def __post_init__(self) -> None:
        abar = self.schedule.alphas_cumprod
        self.abar = abar
        self.before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.abar[t].view(-1, *[1] * (x.dim() - 1))
        return self.predict(x.double(), a, t).to(x.dtype)

    def predict(self, x: Tensor, a: Tensor, t: Tensor) -> Tensor:
        spread = a * self.std**2 + 1 - a
        x0 = (self.std**2 * a.sqrt() * x + (1 - a) * self.mean) / spread
        eps = (1 - a).sqrt() * (x - a.sqrt() * self.mean) / spread
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x0
        if self.prediction_type == "v_prediction":
            return a.sqrt() * eps - (1 - a).sqrt() * x0
        assert self.prediction_type == "mean"
        b = self.before[t].view(a.shape)
        alpha = a / b  # DDPM eq. 7, on the training chain
        return b.sqrt() * (1 - alpha) / (1 - a) * x0 + alpha.sqrt() * (1 - b) / (1 - a) * x


class Bumpy:
    """An elementwise model that is nothing in particular: nonlinear in x, different at every t.

    Its predictions are large enough to be clipped now and then. With a learned variance it has a
    second half of channels: a log variance for "learned", a number around [-1, 1] to interpolate
    with for "learned_range".
    """

    def __init__(self, variance_type: str = "fixed_small") -> None:
        self.variance_type = variance_type

    def __call__(self, x: Tensor, t: Tensor, **_: object) -> Tensor:
        phase = 0.01 * t.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        out = torch.sin(1.5 * x + phase) + 0.3 * x
        if not self.variance_type.startswith("learned"):
            return out
        variance = 1.2 * torch.cos(2 * x - phase)
        if self.variance_type == "learned":
            variance = variance - 5
        return torch.cat([out, variance], dim=1)
