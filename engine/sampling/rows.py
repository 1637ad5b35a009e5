"""The formulas of the family, written as rows of a step table.

A row says how to go from abar = a to abar = b: see `stepfuse.kernels.step_row` for what a kernel
does with it. `Rows` is the one writer of these formulas. The sampler's methods give it float64;
the adapters give it what their libraries compute with, in the dtype and with the rounding of those,
so that the coefficients are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepfuse.kernels.step_row import COLUMNS, Column

T = TypeVar("T", Tensor, npt.NDArray[np.float64])
SMALLEST_VARIANCE = 1e-20  # what stands for 0 before a logarithm is taken


@dataclass(frozen=True)
class Scale:
    """How x, x0 and epsilon belong together, [S] each: x_w x = x0_w x0 + eps_w eps.

    Divided by sqrt(a) it is what guided-diffusion and lucidrains compute with: the same equation
    with other roundings.
    """

    x: Tensor
    x0: Tensor
    eps: Tensor

    @classmethod
    def of_roots(cls, signal: Tensor, noise: Tensor) -> Scale:
        """x = sqrt(a) x0 + sqrt(1-a) eps."""
        return cls(torch.ones_like(signal), signal, noise)

    @classmethod
    def of_reciprocals(cls, signal: Tensor, noise: Tensor) -> Scale:
        """sqrt(1/a) x = x0 + sqrt(1/a - 1) eps."""
        return cls(signal, torch.ones_like(signal), noise)

    def x0_of_epsilon(self) -> tuple[Tensor, Tensor]:
        """(p_x, p_o) of x0 = p_x x + p_o eps (DDPM, section 3.2)."""
        return self.x / self.x0, -self.eps / self.x0


def posterior_mean(a: T, b: T, alpha: T | None = None, beta: T | None = None) -> tuple[T, T]:
    """(c_0, c_x) of the mean c_0 x0 + c_x x of q(x_s | x_t, x_0), DDPM eq. 7.

        c_0 = sqrt(b) beta / (1 - a)      c_x = sqrt(alpha) (1 - b) / (1 - a)

    with alpha = a / b and beta = 1 - alpha unless they are given. Not finite at a = 1. Arrays of
    NumPy give arrays: its square root and PyTorch's differ in the last bit.
    """
    alpha = a / b if alpha is None else alpha
    beta = 1 - alpha if beta is None else beta
    root: Callable[[Any], Any] = np.sqrt if isinstance(a, np.ndarray) else torch.sqrt
    return root(b) * beta / (1 - a), root(alpha) * (1 - b) / (1 - a)


def posterior_variance(a: Tensor, b: Tensor) -> Tensor:
    """beta~ = (1 - b) / (1 - a) (1 - a / b): that of the posterior (DDPM, eq. 7). NaN at a = 1."""
    return (1 - b) / (1 - a) * (1 - a / b)


class Rows:
    """Rows [S, 16] while they are written: ``table`` is float64 and does not move x at first.

    Args:
        t: timesteps [S].
        a: abar where the steps start, b: where they end, [S] of one dtype, whose square roots
            become those columns that a mask reads; None leaves them 0.
        clip: of x0; None for none.
        scale: how x, x0 and epsilon belong together; of the roots of ``a`` unless it is given.
    """

    def __init__(
        self,
        t: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        clip: float | None,
        scale: Scale | None = None,
    ) -> None:
        self.table = torch.zeros(len(t), COLUMNS, dtype=torch.float64, device=t.device)
        self._put(Column.TIMESTEP, t)
        self.table[:, Column.CLIP] = math.inf if clip is None else clip
        self.table[:, Column.GUIDANCE] = 1.0
        if a is not None and b is not None:
            self.between((a.sqrt(), (1 - a).sqrt()), (b.sqrt(), (1 - b).sqrt()))
        self._clips = clip is not None
        self.signal, self.noise = self.table[:, Column.SIGNAL], self.table[:, Column.NOISE]
        self.scale = scale or Scale.of_roots(self.signal, self.noise)

    def between(self, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> None:
        """Where the steps start and end: (signal, noise) of x = signal x0 + noise eps, [S] each."""
        for column, value in zip(
            (Column.SIGNAL, Column.NOISE, Column.SIGNAL_NEXT, Column.NOISE_NEXT),
            (*start, *end),
            strict=True,
        ):
            self._put(column, value)

    def predict(
        self,
        prediction_type: str,
        mean: tuple[Tensor, Tensor] | None = None,
        size: Tensor | float = 1.0,
    ) -> None:
        """x0 = p_x x + p_o o, o being the model's output.

        epsilon           (x - sqrt(1-a) o) / sqrt(a)        DDPM, section 3.2
        sample            o
        v_prediction      sqrt(a) x - sqrt(1-a) o            Salimans & Ho 2022, section 4
        mean              (o - c_x x) / c_0                  with ``mean`` = (c_0, c_x)
        flow_prediction   (x - noise o) / (signal + noise)   o = eps - x0, Lipman et al. 2023

        ``size`` is the root of signal^2 + noise^2: v is that of x divided by it.
        """
        self.prediction_type = prediction_type
        zero = torch.zeros_like(self.signal)
        if prediction_type == "epsilon":
            p_x, p_o = self.scale.x0_of_epsilon()
        elif prediction_type == "sample":
            p_x, p_o = zero, zero + 1
        elif prediction_type == "v_prediction":
            p_x, p_o = self.signal / size**2, -self.noise / size
        elif prediction_type == "flow_prediction":
            both = self.signal + self.noise
            p_x, p_o = 1 / both, -self.noise / both
        else:
            assert mean is not None
            c_0, c_x = mean
            p_x, p_o = -c_x / c_0, 1 / c_0
        self._put(Column.P_X, p_x)
        self._put(Column.P_O, p_o)

    def implicit(
        self,
        b_root: Tensor,
        direction: Tensor,
        sigma: Tensor | float,
        rederive: bool | Tensor,
        where: Tensor | None = None,
    ) -> None:
        """x_s = sqrt(b) x0 + direction eps + sigma z (DDIM, eq. 12), direction^2 = 1 - b - sigma^2.

        ``rederive`` and ``where`` are those of `add_epsilon`.
        """
        self.add_epsilon(direction, rederive, where)
        self._add(Column.C_0, b_root)
        self._put(Column.SIGMA, sigma)

    def add_epsilon(
        self, weight: Tensor, rederive: bool | Tensor, where: Tensor | None = None
    ) -> None:
        """Add ``weight`` eps to the steps, to all or to those ``where`` it is asked for.

        Re-derived, eps = (x_w x - x0_w x0) / eps_w is of the clipped x0, so that its coefficients
        fall to C_X and C_0; otherwise it is the model's own, and they fall to C_X and C_O.
        """
        weight = weight.double()
        x_w, x0_w, eps_w = (v.double() for v in (self.scale.x, self.scale.x0, self.scale.eps))
        zero = torch.zeros_like(weight)
        if self.prediction_type == "epsilon":
            own = zero, weight
        elif self.prediction_type == "v_prediction":
            own = weight * self.noise, weight * self.signal
        else:
            p_x, p_o = self.table[:, Column.P_X], self.table[:, Column.P_O]
            own = weight * (x_w - x0_w * p_x) / eps_w, -(weight * x0_w * p_o / eps_w)
        again = torch.as_tensor(rederive, device=zero.device)
        there = torch.ones_like(zero, dtype=torch.bool) if where is None else where
        for column, rederived, of_model in (
            (Column.C_X, weight * x_w / eps_w, own[0]),
            (Column.C_O, zero, own[1]),
            (Column.C_0, -(weight * x0_w / eps_w), zero),
        ):
            self._add(column, torch.where(there, torch.where(again, rederived, of_model), zero))

    def ancestral(self, mean: tuple[Tensor, Tensor]) -> None:
        """x_s = c_0 x0 + c_x x, the mean of the posterior (DDPM, eq. 7)."""
        self._add(Column.C_0, mean[0])
        self._add(Column.C_X, mean[1])

    def noised(self, sigma: Tensor | float, variance: Tensor | None = None) -> None:
        """... + sigma z; ``variance`` is what a classifier's gradient is multiplied with."""
        self._put(Column.SIGMA, sigma)
        if variance is not None:
            self._put(Column.VARIANCE, variance)

    def learned(self, log_small: Tensor, log_large: Tensor, ranged: bool) -> None:
        """The log variance is l_0 + l_1 w, w being the second half of the model's channels.

        It is w itself, or with ``ranged`` between two bounds (Nichol & Dhariwal 2021, eq. 15).
        """
        self._put(Column.L_0, (log_large + log_small) / 2 if ranged else 0.0)
        self._put(Column.L_1, (log_large - log_small) / 2 if ranged else 1.0)
        self._put(Column.SIGMA, 1.0)

    def _put(self, column: Column, value: Tensor | float) -> None:
        self.table[:, column] = value

    def _add(self, column: Column, value: Tensor) -> None:
        self.table[:, column] += value
