"""Classifier guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepfuse.engine.sampling.denoiser import Condition
from stepfuse.engine.sampling.evaluation import Evaluation
from stepfuse.engine.sampling.guidance.protocol import Outputs
from stepfuse.kernels.checks import as_number, check_word, received
from stepfuse.kernels.step_row import Column


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by the gradient of a classifier (Dhariwal & Nichol 2021, section 4).

        DDPM    mean + scale Sigma grad log p(y | x_t)                    algorithm 1
        DDIM    eps - scale sqrt(1 - abar_t) grad log p(y | x_t)          algorithm 2

    Args:
        fn: called as fn(x, t, **condition) with x [N, C, ...] and t int64 [N].
        scale: strength; 0 switches it off.
        returns: "log_probability" (log p(y | x_t), [N], differentiated here) or "gradient".

    Raises TypeError or ValueError for a function that cannot be called or a scale that is not
    finite.
    """

    fn: Callable[..., Tensor]
    scale: float = 1.0
    returns: Literal["log_probability", "gradient"] = "log_probability"

    def __post_init__(self) -> None:
        if not callable(self.fn) or isinstance(self.fn, type):
            raise TypeError(
                f"fn must be callable as fn(x, t, **condition); got {received(self.fn)}"
            )
        object.__setattr__(self, "scale", as_number("scale", self.scale))
        check_word("returns", self.returns, ("log_probability", "gradient"))

    @property
    def evaluations(self) -> int:
        """Of the model in a guided step."""
        return 1

    @property
    def reads(self) -> tuple[Callable[..., Tensor]]:
        """The function: what it decides from is looked at before a captured step is replayed."""
        return (self.fn,)

    def outputs(self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Condition) -> Outputs:
        """The model's output with epsilon shifted, or with a shift of the mean beside it."""
        output = denoiser(x, t, condition)
        gradient = self.gradient(x, t, condition) * self.scale
        if denoiser.shifts_mean:
            return Outputs(output, shift=gradient * denoiser.variance(x, output))
        return Outputs(epsilon_shifted(denoiser.row, x, output, gradient))

    def check_table(self, table: Tensor, guided: Sequence[bool], shifts_mean: bool) -> None:
        """Raise ValueError where epsilon would be shifted in a step that starts without signal.

        At abar = 0 x0 would move by infinity.
        """
        moved = table[:, Column.VARIANCE].any() or table[:, Column.L_1].any()
        if shifts_mean and any(guided) and len(table) > 1 and not moved:
            raise ValueError(
                "the gradient of a classifier is multiplied by the VARIANCE of a row, and the rows "
                "of this method have none; accepted: rows with a VARIANCE, or a method that does "
                "not shift the mean"
            )
        for row, active in zip(table, guided, strict=True):
            if active and row[Column.SIGNAL] == 0 and not shifts_mean:
                raise ValueError(
                    f"abar is 0 at timestep {int(row[Column.TIMESTEP])}, where a classifier's "
                    "gradient cannot shift epsilon; accepted: method 'ddpm' or 'ddgan', or "
                    "timesteps without it"
                )

    def without_autograd(self) -> ClassifierGuidance:
        """One that runs the classifier and takes no gradient of it.

        Its backward is made of the same kind of operations.
        """
        if self.returns == "gradient":
            return self
        fn = self.fn

        def like_gradient(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
            return x * fn(x, t, **condition).view(-1, *[1] * (x.dim() - 1))

        return ClassifierGuidance(like_gradient, self.scale, "gradient")

    def scale_at(self, t: int) -> float:
        """The scale in force at timestep t."""
        return self.scale

    def is_active(self, t: int) -> bool:
        """Whether the classifier is evaluated at timestep t."""
        return self.scale != 0

    def gradient(self, x: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """grad log p(y | x_t) with respect to x, [N, C, ...]."""
        if self.returns == "gradient":
            return self.fn(x, t, **condition)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            log_probability = self.fn(leaf, t, **condition)
            (gradient,) = torch.autograd.grad(log_probability.sum(), leaf)
        return gradient


def epsilon_shifted(row: Tensor, x: Tensor, output: Tensor, gradient: Tensor) -> Tensor:
    """eps - sqrt(1-abar) g, said in the model's own terms.

    It moves x0 by (1-abar)/sqrt(abar) g, and x0 = p_x x + p_o o, so o moves by that over p_o:
    by nothing at abar = 1, where p_o may be 0.
    """
    by = row[Column.NOISE].square() / row[Column.SIGNAL] / row[Column.P_O]
    by = torch.where(row[Column.NOISE] > 0, by, torch.zeros_like(by))
    shifted = output[:, : x.shape[1]] + (by * gradient).to(output.dtype)
    return torch.cat([shifted, output[:, x.shape[1] :]], dim=1)
