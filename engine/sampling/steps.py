"""Rows of the sampler's own solvers: transitions of a schedule, with their limits and refusals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.engine.sampling.rows import (
    SMALLEST_VARIANCE,
    Rows,
    posterior_mean,
    posterior_variance,
)
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.update import PredictionType, Update, VarianceAtZero
from stepfuse.kernels.checks import LARGEST
from stepfuse.kernels.step_row import COLUMNS, Column, HistoryColumn


class Steps:
    """A table being written: step i starts at timestep t and abar = a, and ends at abar = b.

    All of ``t``, ``a``, ``b`` (and what follows from them below) are [S], float64 but for the int64
    ``t``. x0 is predicted already, and x does not move yet: add `implicit` or `ancestral`, and the
    noise that belongs to it, or write to ``table``, [S, 16], by `Column`.

    Raises ValueError where the model's output says nothing of x0 at a timestep.
    """

    def __init__(self, schedule: Schedule, update: Update, t: Tensor, a: Tensor, b: Tensor) -> None:
        self.t, self.a, self.b, self.update = t, a, b, update
        self._rows = Rows(t, a, b, update.clip_sample)
        self._rows.predict(update.prediction_type, self._training_mean(schedule))
        self.table = self._rows.table
        self.beta = 1 - a / b

    @classmethod
    def down(cls, schedule: Schedule, timesteps: Sequence[int], update: Update) -> Steps:
        """Down ``timesteps`` (descending): the last step goes to x_0 (b = 1), or to b = abar_0 with
        ``final_alpha_one=False``.
        """
        abar = schedule.alphas_cumprod
        t = torch.tensor(list(timesteps), dtype=torch.int64, device=abar.device)
        a = abar[t]
        end = torch.ones_like(abar[:1]) if update.final_alpha_one else abar[:1]
        b = torch.cat([a[1:], end])
        for i, start in enumerate(timesteps):
            if a[i] == 0 and update.prediction_type in ("epsilon", "mean"):
                raise ValueError(
                    f"abar is 0 at timestep {start}: prediction_type must be 'sample' or "
                    f"'v_prediction' there; got {update.prediction_type!r}"
                )
            if b[i] == 0:
                raise ValueError(
                    f"abar is 0 where the step from timestep {start} ends: final_alpha_one must be "
                    "True for this schedule"
                )
        return cls(schedule, update, t, a, b)

    @property
    def last(self) -> Tensor:
        """True in the last step alone."""
        return torch.arange(len(self.t), device=self.t.device) == len(self.t) - 1

    @property
    def posterior_variance(self) -> Tensor:
        """beta~ = (1 - b) / (1 - a) (1 - a / b), 0 at a = 1: DDPM, eq. 7."""
        return torch.where(self.a < 1, posterior_variance(self.a, self.b), 0.0)

    def implicit(self, drift: Tensor, sigma: Tensor) -> None:
        """x_s = sqrt(b) x0 + sqrt(1 - b - drift) eps + sigma z (DDIM, eq. 12)."""
        direction = (1 - self.b - drift).clamp_min(0.0).sqrt()
        self._rows.implicit(self.b.sqrt(), direction, sigma, *self._of_epsilon(direction))

    def add_epsilon(self, weight: Tensor) -> None:
        """Add ``weight`` eps, [S], to the steps.

        It is the model's own, or with ``rederive_epsilon`` that of the clipped x0.

        Raises ValueError at a = 1, where x is x0, for a model that predicts x0 or the mean.
        """
        self._rows.add_epsilon(weight, *self._of_epsilon(weight))

    def _of_epsilon(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(where epsilon is re-derived, where a step asks for it): [S] each."""
        update, asked = self.update, weight != 0
        nothing = (self.a == 1) & asked
        if update.prediction_type in ("sample", "mean") and bool(nothing.any()):
            raise ValueError(
                f"abar is 1 at timestep {int(self.t[nothing][0])}, where "
                f"{update.prediction_type!r} says nothing of the epsilon that the step needs; "
                "prediction_type must be 'epsilon' or 'v_prediction' there"
            )
        rederive = update.rederive_epsilon and update.clip_sample is not None
        return (self.a < 1) & rederive, asked

    def ancestral(self) -> None:
        """x_s = c_0 x0 + c_x x, the posterior's mean (DDPM, eq. 7); x0 itself at a = 1."""
        self._rows.ancestral(_mean(self.a, self.b))

    def noised(self, sigma: Tensor, variance: Tensor) -> None:
        """... + sigma z but in the last step; a classifier's gradient is multiplied by variance."""
        self._rows.noised(torch.where(self.last, 0.0, sigma), variance)

    def learned(self, log_small: Tensor) -> None:
        """... + exp(log variance / 2) z but in the last step; the model gives the log variance."""
        log_large = self.beta.clamp_min(SMALLEST_VARIANCE).log()
        ranged = self.update.variance_type == "learned_range"
        self._rows.learned(log_small, log_large, ranged)
        self.table[:, Column.SIGMA] = torch.where(self.last, 0.0, 1.0)

    def _training_mean(self, schedule: Schedule) -> tuple[Tensor, Tensor] | None:
        """(c_0, c_x) of the training chain, which a model that predicts the mean speaks of."""
        if self.update.prediction_type != "mean":
            return None
        abar = torch.cat([torch.ones_like(self.a[:1]), schedule.alphas_cumprod])
        c_0, c_x = _mean(self.a, abar[self.t])
        if bool((c_0 == 0).any()):
            raise ValueError(
                f"beta is 0 at timestep {int(self.t[c_0 == 0][0])}, where the mean says nothing of "
                "x0: prediction_type must not be 'mean' there"
            )
        return c_0, c_x


def _mean(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    c_0, c_x = posterior_mean(a, b)
    return torch.where(a < 1, c_0, 1.0), torch.where(a < 1, c_x, 0.0)


def posterior_log_variance(
    schedule: Schedule, timesteps: Sequence[int], at_zero: VarianceAtZero = "next"
) -> Tensor:
    """log beta~ of the chain over ``timesteps`` (descending), float64 [S].

        beta~ = (1 - b) / (1 - a) (1 - a / b)          DDPM, eq. 7

    The step to x_0 has beta~ = 0. "next" takes the value of the step before it in the table (the
    reference implementations of DDPM and ADM), "clamp" takes 1e-20 (diffusers, lucidrains).
    """
    a = schedule.alphas_cumprod[list(timesteps)]
    b = torch.cat([a[1:], torch.ones_like(a[:1])])
    variance = (1 - b) / (1 - a).clamp_min(SMALLEST_VARIANCE) * (1 - a / b)
    if at_zero == "next" and len(variance) > 1:
        variance[-1] = variance[-2]
    return variance.clamp_min(SMALLEST_VARIANCE).log()


def check_finite(table: Tensor, schedule: Schedule, prediction_type: PredictionType) -> Tensor:
    """The table; ValueError where a coefficient overflows float32."""
    for row in table.tolist():
        coefficients = (*row[: Column.CLIP], *row[Column.CLIP + 1 :])
        if not all(abs(c) <= LARGEST for c in coefficients):
            t, abar = row[Column.TIMESTEP], row[Column.SIGNAL] ** 2
            if len(row) == COLUMNS:
                abar = float(schedule.alphas_cumprod[int(t)])
            else:
                t = row[COLUMNS + HistoryColumn.TIME]
            raise ValueError(
                f"a coefficient of the step at timestep {int(t) if t == int(t) else t} is not "
                f"finite in float32; abar is {abar:.3g} there, which may be too small for a "
                f"model that predicts {prediction_type!r}"
            )
    return table
