"""What a variational bound consists of, and how much is known after how many bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepfuse.kernels.checks import as_number

LEVELS = 127.5  # of an 8-bit image in a unit of x


class RateDistortion(NamedTuple):
    """How far the predicted images are from the real ones after so many bits, averages of samples.

    Attributes:
        rate: bits/dim received, float64 [S + 1]: L_T first, the whole bound last.
        rmse: root of the mean square error on the scale 0 .. 255, float64 [S + 1]; 0 at the end.
    """

    rate: Tensor
    rmse: Tensor


@dataclass(frozen=True)
class Bound:
    """The variational bound on -log2 p(x0) per dimension, term by term; float64 on the CPU.

    Attributes:
        timesteps: of the chain, descending, S of them; column i of a tensor belongs to entry i.
        prior: L_T = KL(q(x_T | x0) || N(0, 1)), bits/dim [N].
        terms: [N, S] bits/dim: KL(q(x_s | x_t, x0) || p(x_s | x_t)) from each timestep t to the
            next one s; in the last column the decoder's -log2 P(x0 | x_t).
        x0_mse: mean of (x0 - x0_hat(x_t))^2, [N, S], x0 in [-1, 1].
        eps_mse: mean of (eps - eps_hat)^2, [N, S], eps_hat being that of x0_hat; it is x0_mse
            abar / (1 - abar).
    """

    timesteps: tuple[int, ...]
    prior: Tensor
    terms: Tensor
    x0_mse: Tensor
    eps_mse: Tensor

    @property
    def total(self) -> Tensor:
        """The bound of every sample, bits/dim [N]: ``prior`` and all its ``terms``."""
        return self.prior + self.terms.sum(1)

    def rate_distortion(self) -> RateDistortion:
        """Rate and distortion of progressive lossy compression (DDPM, section 4.3).

        Whoever has received x_t, at a cost of L_T and the terms before t's, predicts x0_hat(x_t):
        entry i is what is known at ``timesteps[i]``, and the last one, after the decoder's bits,
        has no error left.
        """
        sent = torch.cat([self.prior[:, None], self.terms], dim=1).mean(0)
        rmse = LEVELS * self.x0_mse.mean(0).sqrt()
        return RateDistortion(sent.cumsum(0), torch.cat([rmse, torch.zeros_like(rmse[:1])]))

    def step_after(self, fraction: float) -> int:
        """The first i at which ``fraction`` of the bits have been received: S for all of them.

        Raises TypeError or ValueError for what is no number in [0, 1].
        """
        part = as_number("fraction", fraction)
        if not 0 <= part <= 1:
            raise ValueError(f"fraction must be in [0, 1]; got {part}")
        if part == 1:
            return len(self.timesteps)
        rate = self.rate_distortion().rate
        return int((rate < part * rate[-1]).sum())

    def standard_error(self) -> float:
        """Of the mean of ``total`` over the samples; NaN for a single one."""
        return float(self.total.std()) / math.sqrt(len(self.total))
