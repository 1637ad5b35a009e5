"""Tomography: the Radon transform of parallel beams."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stepfuse.engine.sampling.inverse.matrix import ByMatrix
from stepfuse.engine.sampling.inverse.operator import as_images
from stepfuse.kernels.checks import as_integer, check_flag

WIDEST = 64  # pixels a side, of which the matrix and its decomposition are kept


class Radon(ByMatrix):
    """Projections of an image along lines at ``angles`` directions, evenly spaced over 180 degrees.

    A pixel at (u, v) from the centre lies at u cos(theta) + v sin(theta) on the detector, and is
    shared by the two bins around that, linearly: every projection has the sum of the image. A bin
    is one pixel wide, and there are ceil(S sqrt(2)) + 1 of them, the diagonal of the image.

    x is [N, C, S, S] with S of at most 64, y [N, C, angles, bins].

    Args:
        angles: how many.
        normalize: divide by the largest singular value, so that |A| = 1.

    Raises TypeError or ValueError for fewer than one angle, and for images that are not square or
    are larger.
    """

    def __init__(self, angles: int, normalize: bool = False) -> None:
        super().__init__()
        self.angles, self.normalize = as_integer("angles", angles), normalize
        if not 1 <= self.angles <= 360:
            raise ValueError(f"angles must be in 1 .. 360; got {angles}")
        check_flag("normalize", normalize)

    def _matrix(self, columns: int) -> Tensor:
        matrix = torch.from_numpy(self._weights(math.isqrt(columns)))
        return matrix / torch.linalg.svdvals(matrix).max() if self.normalize else matrix

    def _weights(self, side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """What each pixel gives to each bin of each angle: [angles bins, side^2]."""
        theta = np.arange(self.angles)[:, None] * np.pi / self.angles
        centred = np.arange(side) - (side - 1) / 2
        v, u = (part.ravel() for part in np.meshgrid(centred, centred, indexing="ij"))
        bins = _bins(side)
        at = np.clip(u * np.cos(theta) + v * np.sin(theta) + (bins - 1) / 2, 0, bins - 1)
        low = np.minimum(np.floor(at).astype(np.int64), bins - 2)
        weights = np.zeros((self.angles, bins, side * side))
        rows, pixels = np.arange(self.angles)[:, None], np.arange(side * side)
        weights[rows, low, pixels] = 1 - (at - low)
        weights[rows, low + 1, pixels] = at - low
        return weights.reshape(-1, side * side)

    def _vectors(self, x: Tensor) -> Tensor:
        height, width = as_images("x", x).shape[2:]
        if height != width or height > WIDEST:
            raise ValueError(
                f"images for Radon must be square, of at most {WIDEST} pixels a side; got x of "
                f"{height}x{width}"
            )
        return x.flatten(2)

    def _columns(self, y: Tensor) -> int:
        bins, angles = as_images("y", y).shape[3], y.shape[2]
        side = int((bins - 1) / math.sqrt(2))
        if side < 1 or _bins(side) != bins or angles != self.angles or side > WIDEST:
            raise ValueError(
                f"y must be [N, C, {self.angles}, bins] with as many bins as an image of at most "
                f"{WIDEST} pixels a side has; got shape {tuple(y.shape)}"
            )
        return side * side

    def _measured(self, y: Tensor, x: Tensor) -> Tensor:
        return y.view(*y.shape[:2], self.angles, _bins(x.shape[-1]))

    def _rows(self, y: Tensor) -> Tensor:
        return y.flatten(2)

    def _imaged(self, x: Tensor, y: Tensor) -> Tensor:
        side = math.isqrt(x.shape[-1])
        return x.view(*x.shape[:2], side, side)


def _bins(side: int) -> int:
    return math.ceil(side * math.sqrt(2)) + 1
