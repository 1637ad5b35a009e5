"""What the rows of one table have in common: the settings of a sampler's update, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from stepfuse.engine.sampling.methods import Method, named
from stepfuse.kernels.arguments import check_literal
from stepfuse.kernels.checks import LARGEST, as_integer, as_number, check_flag, received

PredictionType = Literal["epsilon", "sample", "v_prediction", "mean", "flow_prediction"]
VarianceType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
VarianceAtZero = Literal["next", "clamp"]
Inversion = Literal["current", "target"]


@dataclass(frozen=True)
class Update:
    """What the rows of a table have in common; the parameters are those of `Sampler`."""

    method: str | Method = "ddim"
    eta: float = 0.0
    prediction_type: PredictionType = "epsilon"
    variance_type: VarianceType = "fixed_small"
    variance_at_zero: VarianceAtZero = "next"
    clip_sample: float | None = 1.0
    rederive_epsilon: bool = True
    final_alpha_one: bool = True
    order: int | None = None
    solver_type: str | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        solver = self.solver
        for name, accepted in (
            ("prediction_type", PredictionType),
            ("variance_type", VarianceType),
            ("variance_at_zero", VarianceAtZero),
        ):
            check_literal(name, getattr(self, name), accepted)
        check_flag("rederive_epsilon", self.rederive_epsilon)
        check_flag("final_alpha_one", self.final_alpha_one)
        check_flag("strict", self.strict)
        if not self.strict and "strict" not in solver.takes:
            raise ValueError(f"method {str(self.method)!r} has no other form: strict must be True")
        if self.order is not None:
            order = as_integer("order", self.order, "an int or None")
            object.__setattr__(self, "order", order)
        _check_choice("order", self.order, solver.orders, self.method)
        _check_choice("solver_type", self.solver_type, solver.solver_types, self.method)
        object.__setattr__(self, "eta", as_number("eta", self.eta, finite=False))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta}")
        if self.eta and "eta" not in solver.takes:
            raise ValueError(
                f"method {str(self.method)!r} takes no eta: it must be 0; got eta={self.eta}"
            )
        if self.clip_sample is not None:
            clip = as_number("clip_sample", self.clip_sample, finite=False)
            # a smaller one is 0 in float32, and so would every image be
            if not torch.finfo(torch.float32).tiny <= clip <= LARGEST:
                raise ValueError(f"clip_sample must be positive or None; got {self.clip_sample}")
            object.__setattr__(self, "clip_sample", clip)
        if self.prediction_type not in solver.predictions:
            accepted_types = " or ".join(repr(kind) for kind in solver.predictions)
            raise ValueError(
                f"method {str(self.method)!r} needs prediction_type {accepted_types}; "
                f"got {self.prediction_type!r}"
            )

    @property
    def solver(self) -> Method:
        """The method itself, which writes the rows."""
        return self.method if isinstance(self.method, Method) else named(self.method)

    @property
    def solver_order(self) -> int:
        """``order``, or that which the method has by default; 1 where it has no choice."""
        return self.order or next(iter(self.solver.orders), 1)

    @property
    def kind(self) -> str:
        """``solver_type``, or that which the method has by default."""
        return self.solver_type or next(iter(self.solver.solver_types), "")

    @property
    def chosen(self) -> str:
        """The order and the type of a solver that has several, in words; empty for others."""
        parts = []
        if self.solver.orders:
            parts.append(f" of order {self.solver_order}")
        if self.solver.solver_types and self.solver_order > 1:
            parts.append(f" ({self.kind})")
        if not self.strict:
            parts.append(", not strict")
        return "".join(parts)

    def deterministic(self, clip_sample: float | None) -> Update:
        """DDIM with eta = 0 for the same model, as inversion needs it."""
        return replace(
            self,
            method="ddim",
            eta=0.0,
            clip_sample=clip_sample,
            order=None,
            solver_type=None,
            strict=True,
        )

    @property
    def uses_learned_variance(self) -> bool:
        """Whether the second half of the model's channels enters the update."""
        learned = self.variance_type.startswith("learned")
        return learned and "variance_type" in self.solver.takes

    @property
    def shifts_mean(self) -> bool:
        """Whether a classifier's gradient shifts the mean (DDPM) or epsilon (DDIM)."""
        return self.solver.shifts_mean


def _check_choice(
    name: str, value: object, accepted: tuple[object, ...], method: str | Method
) -> None:
    """ValueError unless it is None or one of those that the method accepts."""
    if value is None or (isinstance(value, (int, str)) and value in accepted):
        return
    if not accepted:
        raise ValueError(
            f"method {str(method)!r} takes no {name}: it must be None; got {received(value)}"
        )
    choices = ", ".join(repr(one) for one in sorted(accepted, key=str))
    raise ValueError(
        f"{name} of method {str(method)!r} must be one of {choices}; got {received(value)}"
    )
