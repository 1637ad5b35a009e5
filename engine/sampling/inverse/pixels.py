"""Operators that take pixels as they are: some of them, or the means of blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stepfuse.engine.sampling.inverse.operator import Number, Operator, as_images, quotient
from stepfuse.kernels.arguments import as_sizes, check_values
from stepfuse.kernels.checks import as_integer, check_real


def _over(r: Tensor, eigenvalue: Number, r2: Number, variance: float) -> Tensor:
    """r / (r2 eigenvalue + variance)."""
    by = r2 * eigenvalue + variance
    return quotient(r, by if isinstance(by, Tensor) else torch.full_like(r, by))


class Mask(Operator):
    """Inpainting: y = m x, with A A^T = diag(m) and A+ = A^T = A.

    Args:
        mask: 1 where the image is measured, 0 where it is missing; broadcastable to [C, H, W].

    Raises TypeError or ValueError for a mask of something else than 0 and 1.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        check_real("mask", mask)
        check_values("mask", mask)
        if not mask.numel() or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must hold 0 (missing) and 1 (measured) only")
        self.mask = mask.detach().clone()

    def _forward(self, x: Tensor) -> Tensor:
        (m,) = self._keep("mask", lambda: (self.mask,), x)
        try:
            m = m.expand(x.shape[1:])
        except RuntimeError:
            raise ValueError(
                f"mask must be broadcastable to {tuple(x.shape[1:])}, the shape of an image; got "
                f"shape {tuple(m.shape)}"
            ) from None
        return m * x

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)

    def _pinv(self, y: Tensor) -> Tensor:
        return self._forward(y)

    def _solve(self, r: Tensor, r2: Number, variance: float) -> Tensor:
        ones = self._forward(torch.ones_like(r))
        return _over(r, ones, r2, variance)


class Outpaint(Operator):
    """What is inside of a border: y = x[..., top:H-bottom, left:W-right], with A A^T = I.

    Args:
        pad: width of the border that is to be painted, one number or (top, bottom, left, right).

    Raises TypeError or ValueError for sizes below 0, for a border of nothing, and where an image
    has nothing inside of the border.
    """

    def __init__(self, pad: int | tuple[int, int, int, int]) -> None:
        super().__init__()
        several = isinstance(pad, (tuple, list))
        sizes = as_sizes("pad", pad if several else [as_integer("pad", pad)] * 4, least=0)
        if len(sizes) != 4 or not any(sizes):
            raise ValueError(
                "pad must be a size of at least 1, or (top, bottom, left, right) with one; "
                f"got {pad}"
            )
        self.pad = sizes

    def _forward(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.pad
        height, width = as_images("x", x).shape[2:]
        if top + bottom >= height or left + right >= width:
            raise ValueError(f"pad {self.pad} leaves nothing of images of {height}x{width}")
        return x[..., top : height - bottom, left : width - right].contiguous()

    def _adjoint(self, y: Tensor) -> Tensor:
        top, bottom, left, right = self.pad
        return functional.pad(as_images("y", y), (left, right, top, bottom))

    def _pinv(self, y: Tensor) -> Tensor:
        return self._adjoint(y)

    def _solve(self, r: Tensor, r2: Number, variance: float) -> Tensor:
        return _over(r, 1.0, r2, variance)


class Downsample(Operator):
    """Super-resolution: y = the means of f x f blocks, with A A^T = I / f^2 and A+ = f^2 A^T.

    Args:
        factor: f, which divides height and width.

    Raises TypeError or ValueError for a factor below 1, or one that does not divide them.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = as_integer("factor", factor)
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1; got {factor}")

    def _forward(self, x: Tensor) -> Tensor:
        f, (height, width) = self.factor, as_images("x", x).shape[2:]
        if height % f or width % f:
            raise ValueError(f"factor must divide {height} and {width}, the sides of x; got {f}")
        return functional.avg_pool2d(x, f)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._pinv(y) / self.factor**2

    def _pinv(self, y: Tensor) -> Tensor:
        as_images("y", y)
        return y.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def _solve(self, r: Tensor, r2: Number, variance: float) -> Tensor:
        return _over(r, 1 / self.factor**2, r2, variance)
