"""A linear measurement of images."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepfuse.kernels.arguments import check_floats
from stepfuse.kernels.checks import as_number

Sizes = tuple[int, ...]
Number = float | Tensor
Self = TypeVar("Self", bound="Operator")


class Operator(ABC):
    """y = A x for x [N, C, ...], each sample by itself.

    Everything is computed on the device of x, in float64 for float64 x and in float32 otherwise.
    Factorisations are made once for a size, in float64, and kept; they count as constants of a
    captured step. Methods raise TypeError or ValueError for what is no such tensor.
    """

    def __init__(self) -> None:
        self._is_bare = False
        self._kept: dict[Hashable, tuple[Tensor, ...]] = {}

    def __repr__(self) -> str:
        said = (f"{k}={_said(v)}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(said)})"

    def __call__(self, x: Tensor) -> Tensor:
        """A x, [N, ...]."""
        return self._forward(self._checked("x", x))

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, like x:  <A x, y> = <x, A^T y>."""
        return self._adjoint(self._checked("y", y))

    def pinv(self, y: Tensor) -> Tensor:
        """A+ y, like x: the smallest x among those with the least |A x - y|; A A+ A = A."""
        return self._pinv(self._checked("y", y))

    def solve(self, r: Tensor, r2: Number, noise: float) -> Tensor:
        """(r2 A A^T + noise^2 I)^-1 r for r like y; r2 is a number or a tensor of one.

        Directions of which both are 0 are left at 0: the pseudo-inverse.
        """
        r = self._checked("r", r)
        if isinstance(r2, Tensor):
            if r2.dim():
                raise ValueError(f"r2 must be one number; got shape {tuple(r2.shape)}")
            r2 = r2.to(r)
        else:
            r2 = as_number("r2", r2)
            if r2 < 0:
                raise ValueError(f"r2 must be 0 or more; got {r2}")
        noise = as_number("noise", noise)
        if noise < 0:
            raise ValueError(f"noise must be 0 or more; got {noise}")
        return self._solve(r, r2, noise * noise)

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _pinv(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _solve(self, r: Tensor, r2: Number, variance: float) -> Tensor: ...

    @property
    def reads(self) -> tuple[Any, ...]:
        """Functions of a user's own that it calls."""
        return ()

    def bare(self: Self) -> Self:
        """The same with nothing kept, for tensors that have a shape only."""
        other = copy.copy(self)
        other._kept, other._is_bare = {}, True
        return other

    def _checked(self, name: str, x: Tensor) -> Tensor:
        if not self._is_bare:
            check_floats(name, x)
        if x.dim() < 2 or not x.numel():
            raise ValueError(f"{name} must have shape [N, ...]; got {tuple(x.shape)}")
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _keep(
        self, key: Hashable, make: Callable[[], Sequence[Tensor]], like: Tensor
    ) -> tuple[Tensor, ...]:
        """What ``make`` gives, in the dtype and on the device of ``like``, made once."""
        known = (key, like.dtype, like.device)
        if known not in self._kept:
            # outside of inference mode, so that it may be used anywhere
            with torch.inference_mode(False), torch.no_grad():
                self._kept[known] = tuple(
                    part.to(like.device, like.dtype).contiguous() for part in make()
                )
        return self._kept[known]


def quotient(a: Tensor, by: Tensor) -> Tensor:
    """a / by, and 0 where ``by`` is 0."""
    none = by == 0
    return torch.where(none, torch.zeros_like(a), a / torch.where(none, torch.ones_like(by), by))


def without_rounding(values: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Singular values of a matrix of ``size`` in ``dtype``, 0 for those below its rounding."""
    least = torch.finfo(dtype).eps * size * values.max()
    return torch.where(values > least, values, torch.zeros_like(values))


def as_images(name: str, x: Tensor) -> Tensor:
    """ValueError unless x is [N, C, H, W]."""
    if x.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W]; got shape {tuple(x.shape)}")
    return x


def _said(value: Any) -> str:
    """An attribute in a text, a tensor by its shape."""
    return f"tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
