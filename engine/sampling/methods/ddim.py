"""DDIM (Song et al. 2021).

    x_s = sqrt(b) x0 + sqrt(1 - b - sigma^2) eps + sigma z             eq. 12
    sigma = eta sqrt((1 - b) / (1 - a) (1 - a / b))                    eq. 16

eta = 0 is deterministic; at eta = 1 sigma^2 is beta~, the variance of DDPM's posterior.
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
    variance = update.eta**2 * steps.posterior_variance
    steps.implicit(drift=variance, sigma=variance.sqrt())
    return steps.table


METHOD = Method(rows, takes=("eta",), name="ddim")
