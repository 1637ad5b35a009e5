"""The solvers, a file each: how the table of a sampler is written.

A file ``<name>.py`` in this folder that ends in ``METHOD = Method(rows, ...)`` is the solver
``Sampler(method="<name>")``; nothing else has to know of it. One of a user's own is given to the
sampler as it is: ``Sampler(method=Method(my_rows))``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # the names are there without torch, for `--help`
    from torch import Tensor

SETTINGS = ("eta", "variance_type", "variance_at_zero", "grid", "strict")
OF_DIFFUSION = ("epsilon", "sample", "v_prediction", "mean")
PREDICTIONS = (*OF_DIFFUSION, "flow_prediction")
SOLVED = ("epsilon", "sample", "v_prediction", "flow_prediction")  # what a solver reads x0 from


@dataclass(frozen=True)
class Method:
    """A solver that is linear in x, the model's output, the clipped x0, noise and earlier ones.

    Args:
        rows: called as ``rows(schedule, timesteps, update)`` with descending timesteps and an
            `Update`; returns the table, float64 [S, 16] on the CPU, see `stepfuse.kernels.step_row`
            for what a row means and `Rows` for a hand in writing it. A solver with a memory returns
            [S, 24], see `stepfuse.engine.sampling.terms`. A function of a module, so that samplers
            can be copied and pickled.
        takes: those of ``eta``, ``variance_type``, ``variance_at_zero``, ``grid`` (and with it
            timesteps that are not whole) and ``strict`` that mean something.
        predictions: the accepted values of ``prediction_type``.
        shifts_mean: a classifier's gradient moves the mean of the step (DDPM) instead of epsilon.
        orders: the accepted values of ``order``, the default first; none where it has no choice.
        solver_types: those of ``solver_type``, likewise.
        name: how it is called in texts; that of ``rows`` where nothing is given.

    Raises TypeError or ValueError for a ``rows`` that cannot be called and for unknown words.
    """

    rows: Callable[[Any, Any, Any], Tensor]
    takes: tuple[str, ...] = ()
    predictions: tuple[str, ...] = OF_DIFFUSION
    shifts_mean: bool = False
    orders: tuple[int, ...] = ()
    solver_types: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.rows) or isinstance(self.rows, type):
            given = _given(self.rows)
            raise TypeError(
                f"rows must be callable as rows(schedule, timesteps, update); got {given}"
            )
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str; got {_given(self.name)}")
        if not isinstance(self.shifts_mean, bool):
            raise TypeError(f"shifts_mean must be True or False; got {_given(self.shifts_mean)}")
        for field, accepted in (("takes", SETTINGS), ("predictions", PREDICTIONS)):
            given = getattr(self, field)
            words = given if isinstance(given, (tuple, list)) else (given,)
            unknown = [w for w in words if not (isinstance(w, str) and w in accepted)]
            if unknown or words is not given:
                raise ValueError(
                    f"{field} must be a tuple of {', '.join(accepted)}; "
                    f"got {_given(unknown[0] if words is given else given)}"
                )
            object.__setattr__(self, field, tuple(given))
        for field, kind in (("orders", int), ("solver_types", str)):
            given = getattr(self, field)
            if not isinstance(given, tuple) or any(type(value) is not kind for value in given):
                raise TypeError(f"{field} must be a tuple of {kind.__name__}; got {_given(given)}")
        if not self.predictions:
            raise ValueError(f"predictions must name one of {', '.join(PREDICTIONS)} at least")
        if not self.name:
            object.__setattr__(self, "name", getattr(self.rows, "__name__", "a method"))

    def __str__(self) -> str:
        return self.name


def names() -> list[str]:
    """The solvers of this folder, in the order of the alphabet."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def named(name: str) -> Method:
    """The solver of that name.

    Raises ValueError with the accepted ones where there is none.
    """
    known = names()
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"method must be a Method or one of {', '.join(known)}; got {_given(name)}"
        )
    return cast(Method, importlib.import_module(f"{__name__}.{name}").METHOD)


def _given(value: object) -> str:
    from stepfuse.kernels.checks import shown  # brings torch

    return shown(value)
