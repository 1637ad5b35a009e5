"""Euler's steps down the probability-flow ODE (Karras et al. 2022, algorithm 2 without noise).

With sigma = noise / signal and y = x / signal,

    y_t = y + (sigma_t - sigma) (y - x0) / sigma

It is DDIM with eta = 0; of a model of flow matching x_t = x + (sigma_t - sigma) v.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepfuse.engine.sampling.methods import SOLVED, Method
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.terms import Terms, table
from stepfuse.engine.sampling.update import Update


def euler(points: Points) -> list[Terms]:
    """The terms: x_t = (s_t / s) x + (a_t - s_t a / s) x0."""
    a, s = points.signal.tolist(), points.noise.tolist()
    return [
        Terms(i, i + 1, x=s[i + 1] / s[i], x0=a[i + 1] - s[i + 1] * a[i] / s[i])
        for i in range(len(points))
    ]


def rows(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """The table, float64 [S, 24]."""
    points = Points.down(schedule, timesteps, update)
    return table(points, euler(points), update.prediction_type, update.clip_sample)


METHOD = Method(rows, takes=("grid",), predictions=SOLVED, name="euler")
