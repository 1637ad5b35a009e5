"""DDPM (Ho et al. 2020, algorithm 2), with learned variances (Nichol & Dhariwal 2021).

    x_s = c_0 x0 + c_x x + sigma z        the posterior's mean, eq. 7

    fixed_small     sigma^2 = beta~       the variance of the posterior
    fixed_large     sigma^2 = 1 - a / b
    learned         log sigma^2 is the model's second half of channels
    learned_range   ... or lies between these two by that half (eq. 15)

The last step adds no noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.engine.sampling.methods import Method
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.steps import Steps, posterior_log_variance
from stepfuse.engine.sampling.update import Update


def rows(schedule: Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    """The table, float64 [S, 16]."""
    steps = Steps.down(schedule, timesteps, update)
    steps.ancestral()
    log_small = posterior_log_variance(schedule, timesteps, update.variance_at_zero)
    if update.uses_learned_variance:
        steps.learned(log_small)
    elif update.variance_type == "fixed_large":
        variance = torch.where(steps.last, log_small.exp(), steps.beta)
        steps.noised(steps.beta.sqrt(), variance)
    else:
        steps.noised(steps.posterior_variance.sqrt(), steps.posterior_variance)
    return steps.table


METHOD = Method(rows, takes=("variance_type", "variance_at_zero"), shifts_mean=True, name="ddpm")
