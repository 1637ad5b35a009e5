"""Euler's ancestral steps (k-diffusion's ``sample_euler_ancestral`` with eta = 1).

With sigma = noise / signal and y = x / signal,

    sigma_up^2 = sigma_t^2 (sigma^2 - sigma_t^2) / sigma^2
    sigma_down^2 = sigma_t^2 - sigma_up^2
    y_t = y + (sigma_down - sigma) (y - x0) / sigma + sigma_up z

so that sigma_down = sigma_t^2 / sigma. It has the moments of DDPM with beta~.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from stepfuse.engine.sampling.methods import SOLVED, Method
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.terms import Terms, table
from stepfuse.engine.sampling.update import Update


def euler_a(points: Points) -> list[Terms]:
    """The terms; with q = sigma_t / sigma, 0 in pure noise, a_t / a = (s_t / s) / q."""
    a, s = points.signal.tolist(), points.noise.tolist()
    found = []
    for i in range(len(points)):
        q = s[i + 1] * a[i] / (s[i] * a[i + 1])
        sigma_up = s[i + 1] * math.sqrt((1 - q) * (1 + q))
        found.append(
            Terms(i, i + 1, x=s[i + 1] / s[i] * q, x0=a[i + 1] * (1 - q * q), sigma=sigma_up)
        )
    return found


def rows(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """The table, float64 [S, 24]."""
    points = Points.down(schedule, timesteps, update)
    return table(points, euler_a(points), update.prediction_type, update.clip_sample)


METHOD = Method(rows, takes=("grid",), predictions=SOLVED, name="euler_a")
