"""Tables of a whole way, and what the host knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from stepfuse.engine.sampling.guidance.protocol import Guidance, Steering
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.steps import Steps, check_finite
from stepfuse.engine.sampling.terms import slots_of, split
from stepfuse.engine.sampling.update import Inversion, Update
from stepfuse.kernels.arguments import check_literal
from stepfuse.kernels.checks import received
from stepfuse.kernels.step_row import COLUMNS, HISTORY_COLUMNS, Column, HistoryColumn


@dataclass(frozen=True)
class Plan:
    """A step table and what the host knows of it: timesteps, and which steps are guided.

    Attributes:
        table: [S, 16].
        timesteps: what the model is given.
        history: the second part of the rows, [S, 8], of a solver that may have a memory.
        slots: how many tensors it keeps.
        left_out: how many rows of the whole way a later start has left out.
    """

    table: Tensor
    timesteps: list[float]
    guided: list[bool]
    scales: list[float] | None = None
    history: Tensor | None = None
    slots: int = 0
    left_out: int = 0

    @classmethod
    def of(
        cls, rows: Tensor, guidance: Guidance | None = None, mean_guidance: bool = False
    ) -> Plan:
        """The plan of rows [S, 16] or [S, 24], with the guidance's scales written into them.

        Raises ValueError where the guidance does not fit the table.
        """
        table, history, slots = rows[:, :COLUMNS], None, 0
        times = rows[:, Column.TIMESTEP]
        if rows.shape[1] > COLUMNS:
            table, history = split(rows)
            times, slots = history[:, HistoryColumn.TIME], slots_of(history)
        timesteps: list[float] = [int(t) if t == int(t) else t for t in times.tolist()]
        plan = cls(table, timesteps, [False] * len(timesteps), None, history, slots)
        return plan.steered(guidance, mean_guidance)

    def steered(self, guidance: Guidance | None, mean_guidance: bool) -> Plan:
        """The same with the scales that a guidance has now.

        Raises ValueError where the guidance does not fit the table.
        """
        steering = Steering.of(guidance)
        if steering is None:
            return self
        table = self.table.clone()
        scales, guided = steering.rows(self.timesteps)
        table[:, Column.GUIDANCE] = torch.tensor(scales, dtype=table.dtype, device=table.device)
        steering.check_table(table, guided, mean_guidance)
        return replace(self, table=table, guided=guided, scales=scales)

    @property
    def whole(self) -> bool:
        """Whether all timesteps are indices on the training schedule."""
        return all(isinstance(t, int) for t in self.timesteps)


def step_table(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """Rows for sampling down ``timesteps`` (descending): float64 [S, 16], or [S, 24] of a solver
    that may have a memory, as `stepfuse.engine.sampling.terms` writes them.

    Raises ValueError where abar_t = 0 and the model predicts epsilon, or is so small that a
    coefficient is infinite in float32, and for a method whose rows are no such table.
    """
    table = update.solver.rows(schedule, timesteps, update)
    rows = f"the rows of method {str(update.method)!r}"
    there = isinstance(table, Tensor) and table.dtype == torch.float64 and table.dim() == 2
    wide = there and table.shape[1] == COLUMNS + HISTORY_COLUMNS
    fits = wide or (there and table.shape[1] == COLUMNS)
    if not fits or not len(table) or table.device.type != "cpu":
        given = received(table)
        if isinstance(table, Tensor):
            given = f"{table.dtype} {list(table.shape)} on {table.device.type}"
        raise ValueError(f"{rows} must be float64 [S, {COLUMNS}] on the CPU; got {given}")
    table, total = table.detach().clone(), schedule.num_train_timesteps
    most = most_rows(total, wide)
    if len(table) > most:
        raise ValueError(f"{rows} must be {most} at most, as many as timesteps; got {len(table)}")
    for row in table.tolist():
        t, clip = row[Column.TIMESTEP], row[Column.CLIP]
        if not wide and t not in range(total):
            raise ValueError(f"{rows} must have a TIMESTEP in 0 .. {total - 1}; got {t:g}")
        if wide and not 0 <= row[COLUMNS + HistoryColumn.TIME] <= total:
            time = row[COLUMNS + HistoryColumn.TIME]
            raise ValueError(f"{rows} must have a TIME in 0 .. {total}; got {time:g}")
        if not clip > 0:
            raise ValueError(f"{rows} must have a positive CLIP, inf for none; got {clip:g}")
    return check_finite(table, schedule, update.prediction_type)


def most_rows(num_train_timesteps: int, wide: bool) -> int:
    """Rows of a table at most: two for a timestep where a solver may evaluate twice."""
    return num_train_timesteps * (2 if wide else 1)


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
