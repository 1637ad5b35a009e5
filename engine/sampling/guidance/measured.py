"""Guidance by a measurement of the image that is sought: PiGDM and DPS."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from stepfuse.engine.sampling.denoiser import Condition
from stepfuse.engine.sampling.evaluation import Evaluation
from stepfuse.engine.sampling.guidance.cfg import CFG
from stepfuse.engine.sampling.guidance.classifier import epsilon_shifted
from stepfuse.engine.sampling.guidance.protocol import Outputs
from stepfuse.engine.sampling.inverse.foreign import as_operator
from stepfuse.engine.sampling.inverse.operator import Operator, quotient
from stepfuse.kernels.checks import as_number, check_word, received
from stepfuse.kernels.step_row import Column

Self = TypeVar("Self", bound="Measured")
WEIGHTS = ("score", "paper")


@dataclass(frozen=True, kw_only=True)
class Measured(ABC):
    """A guidance that asks for ``measurement=y`` and takes one vector-Jacobian product a step.

        raw = p_x x + p_o o(x),  x0h = clip(raw),  J = d x0h / d x
        G   = J^T u = p_x u' + p_o (do/dx)^T u',   u' = u where |raw| <= clip, and 0 elsewhere

    with u of the class, a function of x0h and y. The gradient goes through the clipping, as in the
    official code of DPS: clipped pixels do not learn from y.
    """

    A: Any = field(kw_only=False)
    cfg: CFG | None = None
    _differentiates: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "A", as_operator(self.A))
        if self.cfg is not None and not isinstance(self.cfg, CFG):
            raise TypeError(f"cfg must be a CFG or None; got {received(self.cfg)}")

    @property
    def operator(self) -> Operator:
        """A."""
        found: Operator = self.A
        return found

    @abstractmethod
    def cotangent(self, x0: Tensor, y: Tensor, row: Tensor) -> Tensor:
        """u, like x0, of the clipped prediction."""

    @abstractmethod
    def steered(self, row: Tensor, x: Tensor, output: Tensor, gradient: Tensor) -> Outputs:
        """What the step is made with, of G."""

    @property
    def shifts(self) -> bool:
        """Whether x is shifted after the update, and not the prediction before it."""
        return False

    @property
    def evaluations(self) -> int:
        """Of the model in a guided step."""
        return 1 if self.cfg is None else self.cfg.evaluations

    @property
    def unconditional(self) -> Mapping[str, Any] | None:
        """What replaces entries of the condition for classifier-free guidance."""
        return None if self.cfg is None else self.cfg.unconditional

    @property
    def batched(self) -> bool | Literal["auto"]:
        """Whether both halves go through the model in one call."""
        return False if self.cfg is None else self.cfg.batched

    @property
    def reads(self) -> tuple[Any, ...]:
        """Functions of a user's own operator."""
        return self.operator.reads

    def scale_at(self, t: float) -> float:
        """The scale of classifier-free guidance in force at timestep t."""
        return 1.0 if self.cfg is None else self.cfg.scale_at(t)  # type: ignore[arg-type]

    def measured_shape(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> tuple[int, ...]:
        """That of y for images of ``shape``; what the operator needs for a step is made here.

        Raises ValueError where the operator does not fit such images.
        """
        zeros = torch.zeros((1, *shape[1:]), dtype=dtype, device=device)
        with torch.no_grad():
            y = self.operator(zeros)
            back = self.cotangent(zeros, y, torch.ones(len(Column), dtype=dtype, device=device))
        if back.shape != zeros.shape:
            raise ValueError(
                f"A of the guidance must have an adjoint that gives {list(zeros.shape)}, the shape "
                f"of an image; got {list(back.shape)}"
            )
        return (shape[0], *y.shape[1:])

    def outputs(self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Condition) -> Outputs:
        """The model's output, steered towards the measurement."""
        row = denoiser.row
        if not self._differentiates:
            output = self._evaluated(denoiser, x, t, condition)
            u = self._pulled_back(row, x, output, denoiser.measurement)
            return self.steered(row, x, output, row[Column.P_X] * u + row[Column.P_O] * x)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            output = self._evaluated(denoiser, leaf, t, condition)
            if not output.requires_grad:
                raise TypeError(
                    f"{type(self).__name__} takes a gradient of the model with respect to x, and "
                    "its output has none; accepted: a model that runs under autograd"
                )
            with torch.no_grad():
                u = self._pulled_back(row, x, output, denoiser.measurement)
                by_output = (row[Column.P_O] * u).to(output.dtype)
            (gradient,) = torch.autograd.grad(output[:, : x.shape[1]], leaf, by_output)
        return self.steered(row, x, output.detach(), row[Column.P_X] * u + gradient)

    def check_table(self, table: Tensor, guided: Sequence[bool], shifts_mean: bool) -> None:
        """Raise ValueError where a step starts without signal: x0 would move by infinity."""
        empty = table[:, Column.SIGNAL] == 0
        if bool(empty.any()):
            t = int(table[empty, Column.TIMESTEP][0])
            raise ValueError(
                f"abar is 0 at timestep {t}, where a measurement cannot shift x0; accepted: "
                "timesteps without it, or a schedule that keeps some signal"
            )

    def check_steps(
        self, method: str, prediction_type: str, several: bool, differentiable: bool
    ) -> None:
        """Raise ValueError for a model or a method that cannot be steered so."""
        name = type(self).__name__
        if not differentiable:
            raise ValueError(
                f"{name} takes a gradient of the model, and this one has none; accepted: a model "
                "that runs under autograd, or for missing pixels image= and mask= of sample"
            )
        if prediction_type == "mean":
            raise ValueError(
                f"{name} differentiates the predicted x0, of which a model that predicts 'mean' "
                "says too little where there is noise; accepted: the other prediction types"
            )
        if several and self.shifts:
            raise ValueError(
                f"{name} with a shift after the update fits methods whose steps are one update; "
                f"got {method!r}; accepted: 'ddim', 'ddpm' and the like, or PiGDM with weight "
                "'score'"
            )

    def without_autograd(self: Self) -> Self:
        """One of the same operations but the gradient, whose own are of the same kind."""
        other = replace(self, A=self.operator.bare())
        object.__setattr__(other, "_differentiates", False)
        return other

    def _evaluated(
        self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Condition
    ) -> Tensor:
        """The output that the update would take, mixed where there is classifier-free guidance."""
        if self.cfg is None:
            return denoiser(x, t, condition)
        made = self.cfg.outputs(denoiser, x, t, condition)
        if made.unguided is None:
            return made.model
        channels = x.shape[1]
        scale = denoiser.row[Column.GUIDANCE].to(made.model.dtype)
        cond, uncond = made.model[:, :channels], made.unguided[:, :channels]
        mixed = uncond + scale * (cond - uncond)
        return torch.cat([mixed, made.model[:, channels:]], dim=1)

    def _pulled_back(self, row: Tensor, x: Tensor, output: Tensor, y: Tensor | None) -> Tensor:
        """u', in the dtype of the row."""
        if y is None:
            raise ValueError(f"{type(self).__name__} needs measurement=y, what was measured")
        precise = x.to(row.dtype)
        raw = row[Column.P_X] * precise + row[Column.P_O] * output[:, : x.shape[1]].to(row.dtype)
        clip = row[Column.CLIP]
        u = self.cotangent(torch.minimum(torch.maximum(raw, -clip), clip), y, row)
        return torch.where(raw.abs() <= clip, u, torch.zeros_like(u))


@dataclass(frozen=True)
class PiGDM(Measured):
    """Pseudo-inverse guidance (Song et al. 2023, eq. 7-8), of y = A x0 + noise n.

        u    = A^T (r2 A A^T + noise^2 I)^-1 (y - A x0h),   r2 = c^2 (1-a) / (a c^2 + 1-a)
        G    = J^T u,  the score of p(y | x_t) where x0 given x_t is N(x0h, r2 I)
        eps' = eps - sqrt(1-a) G                            weight "score", then any update
        x_s += sqrt(a b) r2 G                               weight "paper", after the update

    with a = abar where the step starts and b where it ends. "score" is exact for Gaussian data of
    standard deviation c; "paper" is the adaptive weight of algorithm 1 and of public code, which
    with noise and many steps collapses the spread of the samples.

    Args:
        A: an operator of `stepfuse.inverse`, or an object with A(x) and A_adjoint(y).
        noise: standard deviation of what was added to A x0; 0 for none.
        data_std: c, the standard deviation of the data; 1 gives the paper's r2 = 1 - a.
        weight: "score" or "paper".
        cfg: classifier-free guidance of the prediction, differentiated through both evaluations.

    Needs ``measurement=y`` in `Sampler.sample`. Raises TypeError or ValueError for an object
    without an adjoint, noise below 0, data_std of 0 or below, and another weight.
    """

    noise: float = 0.0
    data_std: float = 1.0
    weight: Literal["score", "paper"] = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "noise", as_number("noise", self.noise))
        object.__setattr__(self, "data_std", as_number("data_std", self.data_std))
        if self.noise < 0:
            raise ValueError(f"noise must be 0 or more; got {self.noise}")
        if self.data_std <= 0:
            raise ValueError(f"data_std must be positive; got {self.data_std}")
        check_word("weight", self.weight, WEIGHTS)

    @property
    def shifts(self) -> bool:
        """Whether x is shifted after the update."""
        return self.weight == "paper"

    def cotangent(self, x0: Tensor, y: Tensor, row: Tensor) -> Tensor:
        """A^T (r2 A A^T + noise^2 I)^-1 (y - A x0)."""
        a = self.operator
        return a.adjoint(a.solve(y - a(x0), self._r2(row), self.noise))

    def steered(self, row: Tensor, x: Tensor, output: Tensor, gradient: Tensor) -> Outputs:
        """Epsilon shifted before the update, or x after it."""
        if not self.shifts:
            return Outputs(epsilon_shifted(row, x, output, gradient))
        by = row[Column.SIGNAL] * row[Column.SIGNAL_NEXT] * self._r2(row)
        return Outputs(output, shift=(by * gradient).to(x.dtype))

    def _r2(self, row: Tensor) -> Tensor:
        """The variance of x0 given x_t."""
        noise, spread = row[Column.NOISE].square(), self.data_std**2
        return spread * noise / (row[Column.SIGNAL].square() * spread + noise)


@dataclass(frozen=True)
class DPS(Measured):
    """Diffusion posterior sampling (Chung et al. 2023, algorithm 1): after each update

    x_s -= scale grad |y - A x0h(x_t)|

    with the norm of each sample by itself, so that a batch of two is two singles. The gradient of
    the norm, as in the official code, is half of the paper's zeta' at the same effect.

    Args:
        A: an operator of `stepfuse.inverse`, or an object with A(x) and A_adjoint(y).
        scale: zeta; few steps need more.
        cfg: classifier-free guidance of the prediction, differentiated through both evaluations.

    Needs ``measurement=y`` in `Sampler.sample`. Raises TypeError or ValueError for an object
    without an adjoint and a scale below 0.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scale", as_number("scale", self.scale))
        if self.scale < 0:
            raise ValueError(f"scale must be 0 or more; got {self.scale}")

    @property
    def shifts(self) -> bool:
        """Whether x is shifted after the update: always."""
        return True

    def cotangent(self, x0: Tensor, y: Tensor, row: Tensor) -> Tensor:
        """A^T (y - A x0) / |y - A x0|, and 0 where the norm is 0."""
        r = y - self.operator(x0)
        norm = torch.linalg.vector_norm(r.flatten(1), dim=1).view(-1, *[1] * (r.dim() - 1))
        return self.operator.adjoint(quotient(r, norm.expand_as(r)))

    def steered(self, row: Tensor, x: Tensor, output: Tensor, gradient: Tensor) -> Outputs:
        """x shifted after the update."""
        return Outputs(output, shift=(self.scale * gradient).to(x.dtype))
