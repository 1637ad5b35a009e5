"""The chain whose bound is taken: its reverse steps as a table of numbers, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from stepfuse.engine.sampling.plan import step_table
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.steps import posterior_log_variance
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.step_row import Column

_AT_A_TIME = 256  # samples


class Entry(IntEnum):
    """Where each number of a term stands in its row.

    With o the model's output, w its variance half, d = x0 - x0_hat and a = abar_t,

        x0_hat = clamp(P_X x_t + P_O o, -CLIP, CLIP)
        KL     = CONSTANT + WEIGHT d^2                         nats; a variance that is fixed
        KL     = (l - LOG_TRUE + exp(LOG_TRUE - l) + MEAN^2 d^2 exp(-l) - 1) / 2,  l = L_0 + L_1 w
    """

    P_X = 0
    P_O = 1
    CLIP = 2
    CONSTANT = 3
    WEIGHT = 4
    LOG_TRUE = 5  # of the posterior's variance
    MEAN = 6  # of x0 in the posterior's mean: x_t has one weight on both sides, and falls out
    L_0 = 7
    L_1 = 8
    SNR = 9  # a / (1 - a): eps - eps_hat = -sqrt(a / (1 - a)) d
    LAST = 10  # 1 in the step to x_0, whose term is the decoder's


@dataclass(frozen=True)
class Chain:
    """A Markov chain over some timesteps of a schedule.

    Attributes:
        timesteps: descending, S of them.
        table: float64 [S, 11], see `Entry`.
        abar: where the chain begins, of the first timestep.
        learned: whether the model gives the variances.
    """

    timesteps: tuple[int, ...]
    table: Tensor
    abar: float
    learned: bool

    @classmethod
    def of(cls, schedule: Schedule, timesteps: Sequence[int], update: Update) -> Chain:
        """The ancestral chain down ``timesteps``, whose betas are 1 - a / b between two of them.

        The step to x_0 has the log variance of the step before it (or 1e-20, see `Update`).

        Raises ValueError for fewer than two timesteps, for steps that add no noise, and where the
        model's output says nothing of x0.
        """
        if len(timesteps) < 2:
            raise ValueError(
                "timesteps must be at least two: the last step takes its variance from the one "
                f"before it; got {list(timesteps)}"
            )
        a = schedule.alphas_cumprod[list(timesteps)]
        b = torch.cat([a[1:], torch.ones_like(a[:1])])
        still = [t for t, same in zip(timesteps, (a == b).tolist(), strict=True) if same]
        if still:
            raise ValueError(
                f"the schedule adds no noise at timestep {still[0]}, where the bound needs a "
                "posterior with a variance; leave it out of timesteps"
            )
        rows = step_table(schedule, timesteps, update)
        log_true = posterior_log_variance(schedule, timesteps, update.variance_at_zero)
        last = torch.arange(len(a)) == len(a) - 1
        log_own = log_true
        if update.variance_type == "fixed_large":
            log_own = torch.where(last, log_true, (1 - a / b).log())
        table = torch.zeros(len(a), len(Entry), dtype=torch.float64)
        mean = b.sqrt() * (1 - a / b) / (1 - a)
        for entry, values in (
            (Entry.P_X, rows[:, Column.P_X]),
            (Entry.P_O, rows[:, Column.P_O]),
            (Entry.CLIP, rows[:, Column.CLIP]),
            (Entry.CONSTANT, 0.5 * (torch.expm1(log_true - log_own) - (log_true - log_own))),
            (Entry.WEIGHT, 0.5 * mean.square() * (-log_own).exp()),
            (Entry.LOG_TRUE, log_true),
            (Entry.MEAN, mean),
            (Entry.L_0, rows[:, Column.L_0] if update.uses_learned_variance else log_own),
            (Entry.L_1, rows[:, Column.L_1]),
            (Entry.SNR, a / (1 - a)),
            (Entry.LAST, last),
        ):
            table[:, entry] = values
        return cls(tuple(timesteps), table, float(a[0]), update.uses_learned_variance)

    @property
    def snr(self) -> Tensor:
        """abar / (1 - abar) at every timestep, float64 [S]."""
        return self.table[:, Entry.SNR]

    def prior(self, x0: Tensor) -> Tensor:
        """L_T = KL(N(sqrt(a) x0, 1 - a) || N(0, 1)) of every sample, in bits/dim: float64 [N]."""
        parts = torch.split(x0, _AT_A_TIME)  # so that not all of them are there in float64
        square = torch.cat([mean_per_sample(part.double().square()) for part in parts])
        return 0.5 * (self.abar * square - self.abar - math.log1p(-self.abar)) / math.log(2)


def mean_per_sample(x: Tensor) -> Tensor:
    """The mean of every sample of [N, C, ...], added up in an order that N does not change."""
    # where all of a tensor is one sum, PyTorch cuts it into as many as there are threads
    rows = x.reshape(len(x), -1, x.shape[-1]).sum(2)
    return rows.sum(1) / (rows.shape[1] * x.shape[-1])
