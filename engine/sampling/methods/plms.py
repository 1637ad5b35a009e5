"""PLMS (Liu et al. 2022, "Pseudo numerical methods", eq. 12), with Adams-Bashforth from the start.

    x_t = (a_t / a) x + (s_t - s a_t / a) e'            DDIM's step with another epsilon

    e' = e                                              row 0
    e' = (e + e1) / 2                                   row 1, again from the first point
    e' = (3 e - e1) / 2                                 row 2
    e' = (23 e - 16 e1 + 5 e2) / 12                     row 3
    e' = (55 e - 59 e1 + 37 e2 - 9 e3) / 24             from row 4 on

e is the model's epsilon in this row, e1, e2, e3 those before it; row 1 is asked at the second
point for the step from the first, and its epsilon is not remembered: S + 1 evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepfuse.engine.sampling.methods import SOLVED, Method
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.terms import Terms, epsilon, table
from stepfuse.engine.sampling.update import Update

WEIGHTS = (
    (1.0,),
    (1 / 2, 1 / 2),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(
    points: Points, prediction_type: str, rederive: bool = False, strict: bool = True
) -> list[Terms]:
    """The terms, S + 1 of them, one for a single step.

    Args:
        rederive: take epsilon from the clipped x0 rather than from the model.
        strict: of a model that predicts v, average its v over the rows, as diffusers does, and make
            an epsilon of the average; False averages the epsilons.

    Raises ValueError where the first point is pure noise.
    """
    a, s = points.signal.tolist(), points.noise.tolist()
    if a[0] == 0:
        raise ValueError(
            "method 'plms' steps by epsilon, and its first point must hold some signal; abar is 0 "
            f"at timestep {float(points.timesteps[0]):g}"
        )
    raw = strict and not rederive and prediction_type == "v_prediction"
    # (the model is asked at, the step is from, ... to)
    legs = [(i, i, i + 1) for i in range(len(points))]
    if len(legs) > 1:
        legs.insert(1, (1, 0, 1))
    found: list[Terms] = []
    for number, (asked, start, end) in enumerate(legs):
        scale = a[end] / a[start]
        slope = s[end] - s[start] * scale
        now = epsilon(points, asked, prediction_type, rederive)
        if raw:  # epsilon is e_x x + e_o v where the step is from
            e_x, e_o, _ = epsilon(points, start, prediction_type, rederive)
            scale, slope, now = scale + slope * e_x, slope * e_o, (0.0, 1.0, 0.0)
        row = Terms(asked, end, x=scale, remember=now)
        own, *before = WEIGHTS[min(number, 4)]
        if number == 1:  # x is that of the first point, times scale, + e1 slope
            row.x, row.remember = 1.0, None
            row.look_back(1, -slope)
        row.add(now, own * slope)
        for ago, weight in enumerate(before, 1):
            row.look_back(ago, weight * slope)
        found.append(row)
    return found


def rows(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """The table, float64 [S + 1, 24]."""
    points = Points.down(schedule, timesteps, update)
    rederive = update.clip_sample is not None and update.rederive_epsilon
    terms = plms(points, update.prediction_type, rederive, update.strict)
    return table(points, terms, update.prediction_type, update.clip_sample)


METHOD = Method(rows, takes=("grid", "strict"), predictions=SOLVED, name="plms")
