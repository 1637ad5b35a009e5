"""The step table: every sampler of the family as rows of 16 numbers, computed in float64.

A row says how to go from index t to index s < t (to x_0 at the end): see
`stepfuse.kernels.step_row` for what a kernel does with it. Below, a = abar_t and b = abar_s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from stepfuse.engine.sampling.guidance import ClassifierGuidance, Guidance
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.kernels.arguments import check_literal
from stepfuse.kernels.checks import LARGEST, as_number, check_flag
from stepfuse.kernels.step_row import COLUMNS, Column

Method = Literal["ddim", "ddpm", "ddim_hat", "ddgan"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "mean"]
VarianceType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
VarianceAtZero = Literal["next", "clamp"]
Inversion = Literal["current", "target"]

_SMALLEST_VARIANCE = 1e-20


@dataclass(frozen=True)
class Update:
    """What the rows of a table have in common; the parameters are those of `Sampler`."""

    method: Method = "ddim"
    eta: float = 0.0
    prediction_type: PredictionType = "epsilon"
    variance_type: VarianceType = "fixed_small"
    variance_at_zero: VarianceAtZero = "next"
    clip_sample: float | None = 1.0
    rederive_epsilon: bool = True
    final_alpha_one: bool = True

    def __post_init__(self) -> None:
        for name, accepted in (
            ("method", Method),
            ("prediction_type", PredictionType),
            ("variance_type", VarianceType),
            ("variance_at_zero", VarianceAtZero),
        ):
            check_literal(name, getattr(self, name), accepted)
        check_flag("rederive_epsilon", self.rederive_epsilon)
        check_flag("final_alpha_one", self.final_alpha_one)
        object.__setattr__(self, "eta", as_number("eta", self.eta, finite=False))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta}")
        if self.eta and self.method != "ddim":
            raise ValueError(
                f"eta belongs to method 'ddim'; got eta={self.eta} with {self.method!r}"
            )
        if self.clip_sample is not None:
            clip = as_number("clip_sample", self.clip_sample, finite=False)
            # a smaller one is 0 in float32, and so would every image be
            if not torch.finfo(torch.float32).tiny <= clip <= LARGEST:
                raise ValueError(f"clip_sample must be positive or None; got {self.clip_sample}")
            object.__setattr__(self, "clip_sample", clip)
        if self.method == "ddgan" and self.prediction_type != "sample":
            raise ValueError(
                f"method 'ddgan' needs prediction_type 'sample'; got {self.prediction_type!r}"
            )

    @property
    def uses_learned_variance(self) -> bool:
        """Whether the second half of the model's channels enters the update."""
        return self.method == "ddpm" and self.variance_type.startswith("learned")

    @property
    def shifts_mean(self) -> bool:
        """Whether a classifier's gradient shifts the mean (DDPM) or epsilon (DDIM)."""
        return self.method in ("ddpm", "ddgan")


@dataclass(frozen=True)
class Plan:
    """A step table and what the host knows of it: timesteps, and which steps are guided."""

    table: Tensor
    timesteps: list[int]
    guided: list[bool]

    @classmethod
    def of(
        cls, table: Tensor, guidance: Guidance | None = None, mean_guidance: bool = False
    ) -> Plan:
        """The plan of a table, with the guidance's scales written into it.

        Raises ValueError where a classifier's gradient would shift the epsilon of a step that
        starts without signal (abar = 0), instead of the mean: x0 would move by infinity.
        """
        timesteps = [int(t) for t in table[:, Column.TIMESTEP]]
        if guidance is None:
            return cls(table, timesteps, [False] * len(timesteps))
        table = table.clone()
        scales = [guidance.scale_at(t) for t in timesteps]
        table[:, Column.GUIDANCE] = torch.tensor(scales, dtype=table.dtype)
        guided = [guidance.is_active(t) for t in timesteps]
        if isinstance(guidance, ClassifierGuidance) and not mean_guidance:
            for t, active, signal in zip(timesteps, guided, table[:, Column.SIGNAL], strict=True):
                if active and signal == 0:
                    raise ValueError(
                        f"abar is 0 at timestep {t}, where a classifier's gradient cannot shift "
                        "epsilon; accepted: method 'ddpm' or 'ddgan', or timesteps without it"
                    )
        return cls(table, timesteps, guided)


def step_table(schedule: Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    """Rows for sampling down ``timesteps`` (descending): float64 [S, 16].

    The last row goes to x_0 (b = 1), or to b = abar_0 with ``final_alpha_one=False``.

    Raises ValueError where abar_t = 0 and the model predicts epsilon, or is so small that a
    coefficient is infinite in float32.
    """
    abar = schedule.alphas_cumprod
    ends = [float(abar[s]) for s in timesteps[1:]]
    ends.append(1.0 if update.final_alpha_one else float(abar[0]))
    variances = posterior_log_variance(schedule, timesteps, update.variance_at_zero)
    rows = [
        _row(schedule, t, b, update, last=i == len(timesteps) - 1, log_small=float(variances[i]))
        for i, (t, b) in enumerate(zip(timesteps, ends, strict=True))
    ]
    return _finite(rows, update, schedule)


def inversion_table(
    schedule: Schedule, timesteps: Sequence[int], update: Update, convention: Inversion
) -> Tensor:
    """Rows for encoding x_0 upward, the deterministic DDIM row read from b to a (section 4.3).

    "current" evaluates the model where x is, starting from x_0 taken as the lowest timestep: S-1
    rows (Dhariwal & Nichol, appendix F). "target" evaluates it where x goes, starting from
    abar = 1: S rows (as diffusers' inverse scheduler). ``update.clip_sample`` says whether x0 is
    clipped on the way.
    """
    check_literal("convention", convention, Inversion)
    abar = schedule.alphas_cumprod
    up = list(reversed(timesteps))
    if convention == "current":
        legs = [(t, float(abar[t]), float(abar[s])) for t, s in pairwise(up)]
    elif update.prediction_type in ("sample", "mean"):
        raise ValueError(
            "inversion 'target' starts at abar = 1, where a model that predicts "
            f"{update.prediction_type!r} says nothing of epsilon; use 'current'"
        )
    else:
        starts = [1.0, *(float(abar[t]) for t in up[:-1])]
        legs = [(t, a, float(abar[t])) for t, a in zip(up, starts, strict=True)]
    rows = []
    for t, a, b in legs:
        p_x, p_o = _x0_coefficients(update.prediction_type, schedule, t, a)
        row = _empty_row(t, a, b, update.clip_sample)
        row[Column.P_X], row[Column.P_O] = p_x, p_o
        _add_epsilon(row, update, a, math.sqrt(1 - b), p_x, p_o)
        row[Column.C_0] += math.sqrt(b)
        rows.append(row)
    return _finite(rows, update, schedule)


def posterior_log_variance(
    schedule: Schedule, timesteps: Sequence[int], at_zero: VarianceAtZero = "next"
) -> Tensor:
    """log beta~ of the chain over ``timesteps`` (descending), float64 [S].

        beta~ = (1 - b) / (1 - a) (1 - a / b)          DDPM, eq. 7

    The step to x_0 has beta~ = 0. "next" takes the value of the step before it in the table (the
    reference implementations of DDPM and ADM), "clamp" takes 1e-20 (diffusers, lucidrains).
    """
    abar = schedule.alphas_cumprod
    a = abar[list(timesteps)]
    b = torch.cat([a[1:], torch.ones(1, dtype=torch.float64)])
    variance = (1 - b) / (1 - a).clamp_min(_SMALLEST_VARIANCE) * (1 - a / b)
    if at_zero == "next" and len(variance) > 1:
        variance[-1] = variance[-2]
    return variance.clamp_min(_SMALLEST_VARIANCE).log()


def _finite(rows: list[list[float]], update: Update, schedule: Schedule) -> Tensor:
    """The rows as float64 [S, 16]; ValueError where a coefficient overflows float32."""
    for row in rows:
        coefficients = (*row[: Column.CLIP], *row[Column.CLIP + 1 :])
        if not all(abs(c) <= LARGEST for c in coefficients):
            t = int(row[Column.TIMESTEP])
            raise ValueError(
                f"a coefficient of the step at timestep {t} is not finite in float32: abar is "
                f"{float(schedule.alphas_cumprod[t]):.3g} there, too small for a model that "
                f"predicts {update.prediction_type!r}"
            )
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, COLUMNS)


def _row(
    schedule: Schedule, t: int, b: float, update: Update, *, last: bool, log_small: float
) -> list[float]:
    a = float(schedule.alphas_cumprod[t])
    if a == 0 and update.prediction_type in ("epsilon", "mean"):
        raise ValueError(
            f"abar is 0 at timestep {t}: prediction_type must be 'sample' or 'v_prediction' there; "
            f"got {update.prediction_type!r}"
        )
    if b == 0:
        raise ValueError(
            f"abar is 0 where the step from timestep {t} ends: final_alpha_one must be True for "
            "this schedule"
        )
    row = _empty_row(t, a, b, update.clip_sample)
    p_x, p_o = _x0_coefficients(update.prediction_type, schedule, t, a)
    row[Column.P_X], row[Column.P_O] = p_x, p_o
    beta = 1 - a / b
    if update.method in ("ddim", "ddim_hat"):
        deterministic = 1.0 if update.method == "ddim_hat" else update.eta
        # at eta = 1 the product is beta~, the variance of DDPM's posterior
        variance = deterministic**2 * (1 - b) / (1 - a) * beta if a < 1 else 0.0
        sigma = math.sqrt(variance)
        if update.method == "ddim_hat":
            sigma = 0.0 if last else math.sqrt(beta)
        _add_epsilon(row, update, a, math.sqrt(max(1 - b - variance, 0.0)), p_x, p_o)
        row[Column.C_0] += math.sqrt(b)
        row[Column.SIGMA] = sigma
        return row
    row[Column.C_0], row[Column.C_X] = _posterior_mean(a, b)
    if update.uses_learned_variance:
        low, high = log_small, math.log(max(beta, _SMALLEST_VARIANCE))
        learned_range = update.variance_type == "learned_range"
        row[Column.L_0] = (high + low) / 2 if learned_range else 0.0
        row[Column.L_1] = (high - low) / 2 if learned_range else 1.0
        sigma = 1.0
    elif update.variance_type == "fixed_large" and update.method == "ddpm":
        sigma = math.sqrt(beta)
        row[Column.VARIANCE] = math.exp(log_small) if last else beta
    else:
        row[Column.VARIANCE] = (1 - b) / (1 - a) * beta if a < 1 else 0.0
        sigma = math.sqrt(row[Column.VARIANCE])
    row[Column.SIGMA] = 0.0 if last else sigma
    return row


def _empty_row(t: int, a: float, b: float, clip_sample: float | None) -> list[float]:
    row = [0.0] * COLUMNS
    row[Column.TIMESTEP] = float(t)
    row[Column.CLIP] = math.inf if clip_sample is None else clip_sample
    row[Column.GUIDANCE] = 1.0
    row[Column.SIGNAL], row[Column.NOISE] = math.sqrt(a), math.sqrt(1 - a)
    row[Column.SIGNAL_NEXT], row[Column.NOISE_NEXT] = math.sqrt(b), math.sqrt(1 - b)
    return row


def _x0_coefficients(
    prediction_type: PredictionType, schedule: Schedule, t: int, a: float
) -> tuple[float, float]:
    """(p_x, p_o) of x0 = p_x x + p_o o, x being at abar = a.

    epsilon  (x - sqrt(1-a) o) / sqrt(a)            DDPM, section 3.2
    v        sqrt(a) x - sqrt(1-a) o                Salimans & Ho 2022, section 4
    mean     (o - c_x x) / c_0                      the posterior mean of the training chain
    """
    if prediction_type == "epsilon":
        return 1 / math.sqrt(a), -math.sqrt(1 - a) / math.sqrt(a)
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return math.sqrt(a), -math.sqrt(1 - a)
    previous = float(schedule.alphas_cumprod[t - 1]) if t else 1.0
    c_0, c_x = _posterior_mean(a, previous)
    if c_0 == 0:
        raise ValueError(
            f"beta is 0 at timestep {t}, where the mean says nothing of x0: prediction_type must "
            "not be 'mean' there"
        )
    return -c_x / c_0, 1 / c_0


def _posterior_mean(a: float, b: float) -> tuple[float, float]:
    """(c_0, c_x) of the mean of q(x_s | x_t, x_0), DDPM eq. 7."""
    alpha = a / b
    return (
        math.sqrt(b) * (1 - alpha) / (1 - a) if a < 1 else 1.0,
        math.sqrt(alpha) * (1 - b) / (1 - a) if a < 1 else 0.0,
    )


def _add_epsilon(
    row: list[float], update: Update, a: float, weight: float, p_x: float, p_o: float
) -> None:
    """Add ``weight`` eps to the row, eps = (x - sqrt(a) x0) / sqrt(1-a).

    Re-derived, x0 is the clipped one, so that the coefficients fall to C_X and C_0; otherwise it is
    p_x x + p_o o, the model's own, and they fall to C_X and C_O.
    """
    if weight == 0:
        return
    if a == 1 and update.prediction_type in ("sample", "mean"):
        raise ValueError(
            f"abar is 1 at timestep {int(row[Column.TIMESTEP])}, where {update.prediction_type!r} "
            "says nothing of the epsilon that the step needs; prediction_type must be 'epsilon' or "
            "'v_prediction' there"
        )
    # at a = 1 x is x0, and says nothing of epsilon
    if update.rederive_epsilon and update.clip_sample is not None and a < 1:
        row[Column.C_X] += weight / math.sqrt(1 - a)
        row[Column.C_0] -= weight * math.sqrt(a / (1 - a))
    elif update.prediction_type == "epsilon":
        row[Column.C_O] += weight
    elif update.prediction_type == "v_prediction":
        row[Column.C_X] += weight * math.sqrt(1 - a)
        row[Column.C_O] += weight * math.sqrt(a)
    else:
        row[Column.C_X] += weight * (1 - math.sqrt(a) * p_x) / math.sqrt(1 - a)
        row[Column.C_O] -= weight * math.sqrt(a) * p_o / math.sqrt(1 - a)
