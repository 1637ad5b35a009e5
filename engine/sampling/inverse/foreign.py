"""Operators of others, by the names of their methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.sampling.inverse.operator import Number, Operator, quotient
from stepfuse.kernels.checks import as_integer, received

ITERATIONS = 20


class Foreign(Operator):
    """An object with ``A(x)`` and ``A_adjoint(y)``, and perhaps ``A_dagger(y)``: deepinv's physics.

    `solve`, and `pinv` where there is no A_dagger, are so many steps of conjugate gradients
    (Hestenes & Stiefel 1952), each sample by itself; a fixed number, so that they can be captured.
    As many as y has elements are exact, and fewer do where A A^T has few different eigenvalues.

    Args:
        physics: the object. A step with it is captured if its methods can be.
        iterations: of conjugate gradients.

    Raises TypeError for an object without one of the two, and ValueError for no iterations.
    """

    def __init__(self, physics: Any, iterations: int = ITERATIONS) -> None:
        super().__init__()
        _check_methods("physics", physics)
        self.physics, self.iterations = physics, as_integer("iterations", iterations)
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {iterations}")

    @property
    def reads(self) -> tuple[Any, ...]:
        """Its methods: what they decide from is looked at before a captured step is replayed."""
        return (self.physics.A, self.physics.A_adjoint)

    def _forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.physics.A(x)
        return y

    def _adjoint(self, y: Tensor) -> Tensor:
        x: Tensor = self.physics.A_adjoint(y)
        return x

    def _pinv(self, y: Tensor) -> Tensor:
        dagger = getattr(self.physics, "A_dagger", None)
        if dagger is not None:
            x: Tensor = dagger(y)
            return x
        return self._adjoint(self._solve(y, 1.0, 0.0))

    def _solve(self, r: Tensor, r2: Number, variance: float) -> Tensor:
        def apply(v: Tensor) -> Tensor:
            return r2 * self._forward(self._adjoint(v)) + variance * v

        found, left, along = torch.zeros_like(r), r, r
        size = _dot(r, r)
        for _ in range(self.iterations):
            ahead = apply(along)
            by = quotient(size, _dot(along, ahead))
            found, left = found + by * along, left - by * ahead
            size, before = _dot(left, left), size
            along = left + quotient(size, before) * along
        return found


def as_operator(a: Any) -> Operator:
    """An operator of this package as it is, another object as `Foreign`; TypeError for the rest."""
    if isinstance(a, Operator):
        return a
    _check_methods("A", a)
    return Foreign(a)


def _check_methods(name: str, value: Any) -> None:
    missing = [m for m in ("A", "A_adjoint") if not callable(getattr(value, m, None))]
    why = f"which has no {' and no '.join(missing)}" if missing else "the class"
    if missing or isinstance(value, type):
        raise TypeError(
            f"{name} must be an operator of stepfuse.inverse, or an object with A(x) and "
            f"A_adjoint(y); got {received(value)}, {why}"
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample, [N, 1, ...]."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))
