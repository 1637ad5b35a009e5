"""DDGAN (Xiao et al. 2022, eq. 4): the posterior of an x0 that the generator gives.

    x_s = c_0 G(x, t) + c_x x + sqrt(beta~) z

The steps are large, and the last adds no noise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepfuse.engine.sampling.methods import Method
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.steps import Steps
from stepfuse.engine.sampling.update import Update


def rows(schedule: Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    """The table, float64 [S, 16]."""
    steps = Steps.down(schedule, timesteps, update)
    steps.ancestral()
    steps.noised(steps.posterior_variance.sqrt(), steps.posterior_variance)
    return steps.table


METHOD = Method(rows, predictions=("sample",), shifts_mean=True, name="ddgan")
