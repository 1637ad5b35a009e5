"""Rows with a memory, run as `stepfuse.kernels.step_row` reads; and exactly known moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import split
from stepfuse.kernels.step_row import SLOTS, Column, HistoryColumn

Model = Callable[[Tensor, Tensor], Tensor]


def run(
    rows: Tensor,
    model: Model,
    x: Tensor,
    noise: Sequence[Tensor] | None = None,
    known: Sequence[Tensor] = (),
) -> Tensor:
    """x after all rows, [R, 24], in the dtype of x; the history begins as NaN.

    ``known`` is put in the place of x before the first rows.
    """
    history = [torch.full_like(x, math.nan) for _ in range(SLOTS)]
    for number, (row, memory) in enumerate(zip(*split(rows), strict=True)):
        x = known[number] if number < len(known) else x
        t = memory[HistoryColumn.TIME].expand(len(x))
        out = model(x, t)
        c = row.to(x.dtype)
        clip = float(row[Column.CLIP])
        x0 = (c[Column.P_X] * x + c[Column.P_O] * out).clamp(-clip, clip)
        h = memory.to(x.dtype)
        x_s = c[Column.C_X] * x + c[Column.C_O] * out + c[Column.C_0] * x0
        for slot in range(SLOTS):
            if h[slot] != 0:
                x_s = x_s + h[slot] * history[slot]
        if noise is not None:
            x_s = x_s + c[Column.SIGMA] * noise[number]
        write = int(memory[HistoryColumn.WRITE])
        if write >= 0:
            history[write] = (
                h[HistoryColumn.H_X] * x + h[HistoryColumn.H_O] * out + h[HistoryColumn.H_0] * x0
            )
        x = x_s
    return x


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((found - expected).norm() / expected.norm())


class GaussianPoints:
    """Gaussian data of several means and spreads, and their best denoiser at any point.

    An element has mean m and standard deviation d; x = a x0 + s eps has the best x0
    (d^2 a x + s^2 m) / (a^2 d^2 + s^2), and the flow of the probabilities keeps
    (x - a m) / sqrt(a^2 d^2 + s^2).
    """

    MEANS = torch.tensor([0.3, -0.7, 0.0, 1.1], dtype=torch.float64)
    SPREADS = torch.tensor([0.5, 0.1, 1.0, 0.3], dtype=torch.float64)

    def __init__(self, points: Points) -> None:
        self.points = points
        self.at = {float(t): i for i, t in enumerate(points.timesteps)}

    def affine(self, i: int) -> tuple[Tensor, Tensor]:
        """(k, m) of x0 = k x + m, [4] each, at point i."""
        a, s = self.points.signal[i], self.points.noise[i]
        total = a**2 * self.SPREADS**2 + s**2
        return self.SPREADS**2 * a / total, s**2 * self.MEANS / total

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x0 at timestep t [N] of x [N, 4]."""
        k, m = self.affine(self.at[float(t[0])])
        return k * x + m

    def spread(self, i: int) -> Tensor:
        """Standard deviation of x at point i, [4]."""
        a, s = self.points.signal[i], self.points.noise[i]
        return (a**2 * self.SPREADS**2 + s**2).sqrt()

    def flow(self, x: Tensor, start: int, end: int) -> Tensor:
        """Where the exact flow brings x, [N, 4]."""
        a, b = self.points.signal[start], self.points.signal[end]
        return (x - a * self.MEANS) / self.spread(start) * self.spread(end) + b * self.MEANS


def log_snr_points(steps: int, first: float = -4.0, last: float = 4.0) -> Points:
    """Equal parts of log-SNR, on a circle signal^2 + noise^2 = 1."""
    log_snr = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return Points(
        torch.arange(steps, 0, -1),
        torch.sigmoid(2 * log_snr).sqrt(),
        torch.sigmoid(-2 * log_snr).sqrt(),
    )


def moments(rows: Tensor, data: GaussianPoints) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x after the rows, [4] each, x_T being exactly distributed.

    The mean and covariance of (x, h0, h1, h2) are propagated: everything is affine.
    """
    mean = torch.zeros(4, 1 + SLOTS, dtype=torch.float64)
    covariance = torch.zeros(4, 1 + SLOTS, 1 + SLOTS, dtype=torch.float64)
    mean[:, 0] = data.points.signal[0] * data.MEANS
    covariance[:, 0, 0] = data.spread(0) ** 2
    for row, memory in zip(*split(rows), strict=True):
        k, m = data.affine(data.at[float(memory[HistoryColumn.TIME])])
        step = torch.eye(1 + SLOTS, dtype=torch.float64).repeat(4, 1, 1)
        shift = torch.zeros(4, 1 + SLOTS, dtype=torch.float64)
        # the model gives x0 itself: P_X = 0, P_O = 1
        by_x0 = row[Column.C_0] + row[Column.C_O]
        step[:, 0, 0] = row[Column.C_X] + by_x0 * k
        step[:, 0, 1:] = memory[:SLOTS]
        shift[:, 0] = by_x0 * m
        write = int(memory[HistoryColumn.WRITE])
        if write >= 0:
            kept = memory[HistoryColumn.H_0] + memory[HistoryColumn.H_O]
            step[:, 1 + write] = 0
            step[:, 1 + write, 0] = memory[HistoryColumn.H_X] + kept * k
            shift[:, 1 + write] = kept * m
        mean = torch.einsum("nij,nj->ni", step, mean) + shift
        covariance = step @ covariance @ step.mT
        covariance[:, 0, 0] += row[Column.SIGMA] ** 2
    return mean[:, 0], covariance[:, 0, 0].sqrt()
