"""Sampling from a latent consistency model (Luo et al. 2023, algorithm 3).

    f   = c_skip x + c_out x0
    x_s = a_s f + s_s z                       f itself in the last step

    c_skip = d^2 / (u^2 + d^2)      c_out = u / sqrt(u^2 + d^2)      u = 10 t      d = 1/2

f is the image in one step, noised again for the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from stepfuse.engine.sampling.methods import Method
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.terms import Terms, table
from stepfuse.engine.sampling.update import Update

SIGMA_DATA = 0.5


def lcm(points: Points, timestep_scaling: float = 10.0, noised: bool = True) -> list[Terms]:
    """The terms; u is ``timestep_scaling`` times the timestep. Not ``noised``, x_s is f in all."""
    a, s, times = (v.tolist() for v in (points.signal, points.noise, points.timesteps))
    found = []
    for i in range(len(points)):
        last = i == len(points) - 1 or not noised
        scale, noise = (1.0, 0.0) if last else (a[i + 1], s[i + 1])
        u = timestep_scaling * times[i]
        square = u * u + SIGMA_DATA**2
        skip, out = SIGMA_DATA**2 / square, u / math.sqrt(square)
        found.append(Terms(i, i + 1, x=scale * skip, x0=scale * out, sigma=noise))
    return found


def rows(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """The table, float64 [S, 24]."""
    points = Points.down(schedule, timesteps, update)
    return table(points, lcm(points), update.prediction_type, update.clip_sample)


METHOD = Method(rows, predictions=("epsilon", "sample", "v_prediction"), name="lcm")
