"""DDIM with the larger sigma (Song et al. 2021, section 5).

    x_s = sqrt(b) x0 + sqrt(1 - b - beta~) eps + sqrt(1 - a / b) z

The weight of epsilon is that of eta = 1, the noise is DDPM's larger one; the last step adds none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.engine.sampling.methods import Method
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.steps import Steps
from stepfuse.engine.sampling.update import Update


def rows(schedule: Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    """The table, float64 [S, 16]."""
    steps = Steps.down(schedule, timesteps, update)
    sigma = torch.where(steps.last, 0.0, steps.beta.sqrt())
    steps.implicit(drift=steps.posterior_variance, sigma=sigma)
    return steps.table


METHOD = Method(rows, name="ddim_hat")
