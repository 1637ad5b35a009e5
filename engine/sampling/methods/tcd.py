"""Trajectory consistency distillation (Zheng et al. 2024, algorithm 4): strategic sampling.

    x' = a' x0 + s' eps                                  to timestep floor((1 - eta) s)
    x_s = (a_s / a') x' + sqrt(1 - (a_s / a')^2) z       and back to s, but in the last step

eta, the paper's gamma, is 0 for deterministic steps and 1 for those of a consistency model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.engine.sampling.methods import Method
from stepfuse.engine.sampling.points import Points, roots_at
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.terms import Terms, epsilon, table
from stepfuse.engine.sampling.update import Update


def tcd(
    points: Points, between: tuple[Tensor, Tensor], prediction_type: str, rederive: bool = False
) -> list[Terms]:
    """The terms.

    Args:
        between: (a', s'), [S] each, of signal^2 + noise^2 = 1; those of the last are where it ends.
        rederive: take epsilon from the clipped x0 rather than from the model.
    """
    found = []
    for i, (a, s) in enumerate(zip(between[0].tolist(), between[1].tolist(), strict=True)):
        last = i == len(points) - 1
        ratio = 1.0 if last else float(points.signal[i + 1]) / a
        row = Terms(i, i + 1, x0=ratio * a, sigma=math.sqrt(max(0.0, 1 - ratio * ratio)))
        row.add(epsilon(points, i, prediction_type, rederive), ratio * s)
        found.append(row)
    return found


def rows(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """The table, float64 [S, 24]."""
    points = Points.down(schedule, timesteps, update)
    a, s = roots_at(schedule, ((1 - update.eta) * points.timesteps[1:]).floor())
    between = torch.cat([a, points.signal[-1:]]), torch.cat([s, points.noise[-1:]])
    rederive = update.clip_sample is not None and update.rederive_epsilon
    terms = tcd(points, between, update.prediction_type, rederive)
    return table(points, terms, update.prediction_type, update.clip_sample)


METHOD = Method(rows, takes=("eta",), predictions=("epsilon", "sample", "v_prediction"), name="tcd")
