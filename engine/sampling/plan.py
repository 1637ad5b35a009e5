"""Tables of a whole way, and what the host knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stepfuse.engine.sampling.guidance.protocol import Guidance, Steering
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.steps import Steps, check_finite
from stepfuse.engine.sampling.update import Inversion, Update
from stepfuse.kernels.arguments import check_literal
from stepfuse.kernels.checks import received
from stepfuse.kernels.step_row import COLUMNS, Column


@dataclass(frozen=True)
class Plan:
    """A step table and what the host knows of it: timesteps, and which steps are guided."""

    table: Tensor
    timesteps: list[int]
    guided: list[bool]
    scales: list[float] | None = None

    @classmethod
    def of(
        cls, table: Tensor, guidance: Guidance | None = None, mean_guidance: bool = False
    ) -> Plan:
        """The plan of a table, with the guidance's scales written into it.

        Raises ValueError where the guidance does not fit the table.
        """
        timesteps = [int(t) for t in table[:, Column.TIMESTEP]]
        steering = Steering.of(guidance)
        if steering is None:
            return cls(table, timesteps, [False] * len(timesteps))
        table = table.clone()
        scales, guided = steering.rows(timesteps)
        table[:, Column.GUIDANCE] = torch.tensor(scales, dtype=table.dtype, device=table.device)
        steering.check_table(table, guided, mean_guidance)
        return cls(table, timesteps, guided, scales)


def step_table(schedule: Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    """Rows for sampling down ``timesteps`` (descending): float64 [S, 16].

    Raises ValueError where abar_t = 0 and the model predicts epsilon, or is so small that a
    coefficient is infinite in float32, and for a method whose rows are no such table.
    """
    table = update.solver.rows(schedule, timesteps, update)
    rows = f"the rows of method {str(update.method)!r}"
    there = isinstance(table, Tensor) and table.dtype == torch.float64 and table.dim() == 2
    if not there or table.shape[1] != COLUMNS or not len(table) or table.device.type != "cpu":
        given = received(table)
        if isinstance(table, Tensor):
            given = f"{table.dtype} {list(table.shape)} on {table.device.type}"
        raise ValueError(f"{rows} must be float64 [S, {COLUMNS}] on the CPU; got {given}")
    table, total = table.detach().clone(), schedule.num_train_timesteps
    if len(table) > total:
        raise ValueError(f"{rows} must be {total} at most, as many as timesteps; got {len(table)}")
    for row in table.tolist():
        t, clip = row[Column.TIMESTEP], row[Column.CLIP]
        if t not in range(total):
            raise ValueError(f"{rows} must have a TIMESTEP in 0 .. {total - 1}; got {t:g}")
        if not clip > 0:
            raise ValueError(f"{rows} must have a positive CLIP, inf for none; got {clip:g}")
    return check_finite(table, schedule, update.prediction_type)


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
    t, a, b = torch.tensor(legs, dtype=torch.float64, device=abar.device).reshape(-1, 3).unbind(1)
    steps = Steps(schedule, update, t.long(), a, b)
    nothing = torch.zeros_like(a)
    steps.implicit(drift=nothing, sigma=nothing)
    return check_finite(steps.table, schedule, update.prediction_type)
