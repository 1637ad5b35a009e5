"""Gaussian blur."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stepfuse.engine.sampling.inverse.operator import (
    Number,
    Operator,
    as_images,
    quotient,
    without_rounding,
)
from stepfuse.kernels.arguments import check_literal
from stepfuse.kernels.checks import as_number

Edge = Literal["periodic", "reflect"]
REACH = 4  # standard deviations, beyond which a Gaussian weighs less than 4e-4 of its peak
WIDEST = 256.0


class Blur(Operator):
    """Gaussian blur: Y = K_H X K_W^T, whose two factors have singular value decompositions.

        K = U diag(s) V^T;   A A^T has the eigenvalues (s_i s_j)^2

    Weights exp(-d^2 / 2 sigma^2) for |d| <= 4 sigma, divided by their sum. A+ leaves out singular
    values below the rounding of the largest, so that what it makes of a noisy y is mostly noise.

    Args:
        sigma: in pixels.
        edge: "periodic" continues an image by itself, "reflect" by its mirror image.

    Raises TypeError or ValueError for sigma out of (0, 256] and another word.
    """

    def __init__(self, sigma: float, edge: Edge = "periodic") -> None:
        super().__init__()
        self.sigma, self.edge = as_number("sigma", sigma), edge
        if not 0 < self.sigma <= WIDEST:
            raise ValueError(f"sigma must be in (0, {WIDEST:g}] pixels; got {sigma}")
        check_literal("edge", edge, Edge)

    def _forward(self, x: Tensor) -> Tensor:
        tall, wide = self._factors(as_images("x", x))
        return tall @ x @ wide.mT

    def _adjoint(self, y: Tensor) -> Tensor:
        tall, wide = self._factors(as_images("y", y))
        return tall.mT @ y @ wide

    def _pinv(self, y: Tensor) -> Tensor:
        (left, s, right), (left_w, s_w, right_w) = self._structure(y)
        found = quotient(left.mT @ y @ left_w, _products(s, s_w))
        return right.mT @ found @ right_w

    def _solve(self, r: Tensor, r2: Number, variance: float) -> Tensor:
        (left, s, _), (left_w, s_w, _) = self._structure(r)
        by = r2 * _products(s, s_w).square() + variance
        return left @ quotient(left.mT @ r @ left_w, by) @ left_w.mT

    def _factors(self, x: Tensor) -> list[Tensor]:
        return [
            self._keep((size, "matrix"), lambda: (self._matrix(size),), x)[0]  # noqa: B023
            for size in x.shape[2:]
        ]

    def _structure(self, y: Tensor) -> list[tuple[Tensor, ...]]:
        """U, s and V^T of both factors."""
        return [
            self._keep((size, "svd"), lambda: torch.linalg.svd(self._matrix(size)), y)  # noqa: B023
            for size in as_images("y", y).shape[2:]
        ]

    def _matrix(self, size: int) -> Tensor:
        """K, float64 [size, size]."""
        reach = max(1, math.ceil(REACH * self.sigma))
        offsets = np.arange(-reach, reach + 1)
        weights = np.exp(-0.5 * (offsets / self.sigma) ** 2)
        at = np.arange(size)[:, None] + offsets
        if self.edge == "periodic":
            at %= size
        else:
            at %= 2 * size  # the edge pixel is in its mirror image, too
            at = np.minimum(at, 2 * size - 1 - at)
        matrix = np.zeros((size, size))
        np.add.at(matrix, (np.arange(size)[:, None], at), weights / weights.sum())
        return torch.from_numpy(matrix)


def _products(s: Tensor, s_w: Tensor) -> Tensor:
    """Singular values of the blur, [H, W], from those of its factors."""
    return without_rounding(s[:, None] * s_w, max(len(s), len(s_w)), s.dtype)
