"""Heun's steps down the probability-flow ODE (Karras et al. 2022, algorithm 1): two evaluations.

With sigma = noise / signal, y = x / signal and d = (y - x0) / sigma,

    y'  = y + (sigma_t - sigma) d                    the first row, which remembers
    h   = y + (sigma_t - sigma) d / 2
    y_t = h + (sigma_t - sigma) d' / 2               the second, d' being d at y'

The last step, after which the model is not asked, has the first row alone: 2 S - 1 evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepfuse.engine.sampling.methods import SOLVED, Method
from stepfuse.engine.sampling.methods.euler import euler
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.terms import Terms, table
from stepfuse.engine.sampling.update import Update


def heun(points: Points) -> list[Terms]:
    """The terms; h is remembered in the scale of x_t.

    A step that starts in pure noise is one of Euler's, too: no sigma is halfway from infinity.
    """
    a, s = points.signal.tolist(), points.noise.tolist()
    found: list[Terms] = []
    for i, first in enumerate(euler(points)):
        found.append(first)
        if a[i] == 0 or i == len(points) - 1:
            continue
        # sigma_t - sigma, over 2 sigma and over 2 sigma_t
        back = (s[i + 1] * a[i] / (s[i] * a[i + 1]) - 1) / 2
        on = (1 - s[i] * a[i + 1] / (s[i + 1] * a[i])) / 2
        first.remember = (a[i + 1] / a[i] * (1 + back), 0.0, -a[i + 1] * back)
        second = Terms(i + 1, i + 1, x=on, x0=-a[i + 1] * on)
        second.look_back(1, 1.0)
        found.append(second)
    return found


def rows(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """The table, float64 [2 S - 1, 24]."""
    points = Points.down(schedule, timesteps, update)
    return table(points, heun(points), update.prediction_type, update.clip_sample)


METHOD = Method(rows, takes=("grid",), predictions=SOLVED, name="heun")
