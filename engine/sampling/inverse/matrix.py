"""Operators that are a matrix."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.engine.sampling.inverse.operator import (
    Number,
    Operator,
    Sizes,
    quotient,
    without_rounding,
)
from stepfuse.kernels.arguments import as_sizes, check_floats


class ByMatrix(Operator):
    """y = M x for vectors, by M = U diag(s) V^T with min(rows, columns) singular values:

    A+ = V diag(1/s) U^T
    (r2 M M^T + v)^-1 r = U (U^T r / (r2 s^2 + v)) + (r - U U^T r) / v
    """

    @abstractmethod
    def _matrix(self, columns: int) -> Tensor:
        """M, float64 [rows, columns]."""

    @abstractmethod
    def _vectors(self, x: Tensor) -> Tensor:
        """x as [..., columns]."""

    @abstractmethod
    def _columns(self, y: Tensor) -> int:
        """Those of the matrix that y [N, ...] was measured with."""

    @abstractmethod
    def _measured(self, y: Tensor, x: Tensor) -> Tensor:
        """y, [..., rows], in its shape for images like x."""

    @abstractmethod
    def _rows(self, y: Tensor) -> Tensor:
        """The inverse: [..., rows]."""

    @abstractmethod
    def _imaged(self, x: Tensor, y: Tensor) -> Tensor:
        """x, [..., columns], in the shape of the images of which y was measured."""

    def _forward(self, x: Tensor) -> Tensor:
        vectors = self._vectors(x)
        return self._measured(vectors @ self._m(vectors.shape[-1], x).mT, x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._imaged(self._rows(y) @ self._m(self._columns(y), y), y)

    def _pinv(self, y: Tensor) -> Tensor:
        left, s, right = self._svd(self._columns(y), y)
        found = self._rows(y) @ left
        return self._imaged(quotient(found, s.expand_as(found)) @ right, y)

    def _solve(self, r: Tensor, r2: Number, variance: float) -> Tensor:
        left, s, _ = self._svd(self._columns(r), r)
        rows = self._rows(r)
        inside = rows @ left
        solved = quotient(inside, (r2 * s.square() + variance).expand_as(inside)) @ left.mT
        if variance:
            solved = solved + (rows - inside @ left.mT) / variance
        return solved.reshape(r.shape)

    def _m(self, columns: int, like: Tensor) -> Tensor:
        return self._keep((columns, "matrix"), lambda: (self._matrix(columns),), like)[0]

    def _svd(self, columns: int, like: Tensor) -> tuple[Tensor, ...]:
        """U [rows, k], s [k] with 0 for what is rounding, and V^T [k, columns]."""

        def factorised() -> tuple[Tensor, ...]:
            matrix = self._matrix(columns)
            left, s, right = torch.linalg.svd(matrix, full_matrices=False)
            return left, without_rounding(s, max(matrix.shape), like.dtype), right

        return self._keep((columns, "svd"), factorised, like)


class Dense(ByMatrix):
    """Any matrix: y [N, M] = matrix x, with x laid out as [N, D].

    Args:
        matrix: [M, D], of real numbers.
        shape: of an image, with D elements; (D,) by default.

    Raises TypeError or ValueError for what is no such matrix, is not finite, or does not fit.
    """

    def __init__(self, matrix: Tensor, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        check_floats("matrix", matrix)
        if matrix.dim() != 2 or not matrix.numel():
            raise ValueError(f"matrix must have shape [M, D]; got {tuple(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("matrix must be finite; it holds NaN or infinity")
        self.matrix = matrix.detach().clone()
        columns = matrix.shape[1]
        self.shape: Sizes = (columns,) if shape is None else as_sizes("shape", shape)
        if math.prod(self.shape) != columns:
            raise ValueError(f"shape must have {columns} elements, as matrix; got {self.shape}")

    def _matrix(self, columns: int) -> Tensor:
        return self.matrix.double()

    def _vectors(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must be [N, {_said(self.shape)}]; got shape {tuple(x.shape)}")
        return x.flatten(1)

    def _columns(self, y: Tensor) -> int:
        return self.matrix.shape[1]

    def _measured(self, y: Tensor, x: Tensor) -> Tensor:
        return y

    def _rows(self, y: Tensor) -> Tensor:
        if y.shape[1:] != self.matrix.shape[:1]:
            raise ValueError(f"y must be [N, {len(self.matrix)}]; got shape {tuple(y.shape)}")
        return y

    def _imaged(self, x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(len(y), *self.shape)


def _said(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
