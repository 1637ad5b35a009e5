"""The updates of guided-diffusion's `GaussianDiffusion` as rows of a step table, in float64.

With a = abar_t, b = abar_{t-1} (1 before the first), and what the network means:

    START_X     x0 = out
    EPSILON     x0 = x / sqrt(a) - sqrt(1/a - 1) out
    PREVIOUS_X  x0 = (out - c_x x) / c_0             the mean itself being out

    p_sample             x_s = c_0 x0 + c_x x + std z             DDPM, eq. 7
    ddim_sample          x_s = sqrt(b) x0 + sqrt(1 - b - sigma^2) eps + sigma z     DDIM, eq. 12
    ddim_reverse_sample  x_s = sqrt(d) x0 + sqrt(1 - d) eps       d = abar_{t+1}, 0 after the last

where eps is re-derived from the clipped x0. Row i is timestep i of the object's own schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepfuse.kernels.step_row import COLUMNS, Column

Step = Literal["p_sample", "ddim_sample", "ddim_reverse_sample"]
Array = npt.NDArray[np.float64]

MEAN_TYPES = ("PREVIOUS_X", "START_X", "EPSILON")
VAR_TYPES = ("LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE")


@dataclass(frozen=True)
class Guide:
    """What a gradient g of log p(y|x) adds: ``sample`` g to x_s and ``x0`` g to the predicted x0.

    ``sample`` is None where it is the variance that the network learned.
    """

    sample: float | None
    x0: float


class Rows:
    """Step tables of one diffusion: its betas [T] and what its network predicts."""

    def __init__(self, betas: Any, mean_type: str, var_type: str) -> None:
        self.betas: Array = np.asarray(betas, dtype=np.float64)
        self.mean_type, self.var_type = mean_type, var_type
        alphas = 1 - self.betas
        self.abar: Array = np.cumprod(alphas, dtype=np.float64)
        self.before: Array = np.append(1.0, self.abar[:-1])
        self.after: Array = np.append(self.abar[1:], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.c_0: Array = self.betas * np.sqrt(self.before) / (1 - self.abar)
            self.c_x: Array = (1 - self.before) * np.sqrt(alphas) / (1 - self.abar)
            small = self.betas * (1 - self.before) / (1 - self.abar)
        # beta~ is 0 at the first timestep: its logarithm, and a large variance, take the second's
        clipped = np.append(small[1:2] if len(small) > 1 else small, small[1:])
        self.log_small: Array = np.log(np.maximum(clipped, 1e-300))
        large = np.append(clipped[:1], self.betas[1:])
        self.variance: Array = large if var_type == "FIXED_LARGE" else small
        self.std: Array = np.sqrt(large if var_type == "FIXED_LARGE" else clipped)

    @property
    def learned(self) -> bool:
        """Whether the network gives the variance in a second half of channels."""
        return self.var_type.startswith("LEARNED")

    def table(self, step: Step, clip: bool, eta: float) -> Tensor:
        """float64 [T, 16]."""
        rows = np.zeros((len(self.betas), COLUMNS))
        rows[:, Column.TIMESTEP] = np.arange(len(rows))
        rows[:, Column.GUIDANCE] = 1
        rows[:, Column.CLIP] = 1 if clip else math.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            self._x0(rows)
            if step == "p_sample":
                self._ancestral(rows)
            else:
                self._implicit(rows, *self._ends(step, eta))
        return torch.from_numpy(rows)

    def log_variance(self, i: int) -> tuple[float, float]:
        """(l_0, l_1) of the learned log variance l_0 + l_1 w, w being the output's second half."""
        row = self.table("p_sample", clip=False, eta=0.0)[i]
        return float(row[Column.L_0]), float(row[Column.L_1])

    def guide(self, step: Step, i: int, eta: float) -> Guide:
        """What a gradient adds at timestep i: to the mean for DDPM, to epsilon for DDIM."""
        if step == "p_sample":
            return Guide(None if self.learned else float(self.variance[i]), 0.0)
        end, sigma = self._ends(step, eta)
        a, b = self.abar[i], end[i]
        x0 = (1 - a) / np.sqrt(a)
        direction = np.sqrt(1 - b - sigma[i] ** 2)
        return Guide(float(np.sqrt(b) * x0 - direction * np.sqrt(1 - a)), float(x0))

    def _x0(self, rows: Array) -> None:
        if self.mean_type == "EPSILON":
            rows[:, Column.P_X] = np.sqrt(1 / self.abar)
            rows[:, Column.P_O] = -np.sqrt(1 / self.abar - 1)
        elif self.mean_type == "START_X":
            rows[:, Column.P_O] = 1
        else:
            rows[:, Column.P_X] = -self.c_x / self.c_0
            rows[:, Column.P_O] = 1 / self.c_0

    def _ancestral(self, rows: Array) -> None:
        if self.mean_type == "PREVIOUS_X":
            rows[:, Column.C_O] = 1
        else:
            rows[:, Column.C_0], rows[:, Column.C_X] = self.c_0, self.c_x
        if self.var_type == "LEARNED":
            rows[:, Column.L_1] = 1
        elif self.var_type == "LEARNED_RANGE":
            log_large = np.log(self.betas)
            rows[:, Column.L_0] = (log_large + self.log_small) / 2
            rows[:, Column.L_1] = (log_large - self.log_small) / 2
        rows[:, Column.SIGMA] = 1 if self.learned else self.std
        rows[0, Column.SIGMA] = 0

    def _ends(self, step: Step, eta: float) -> tuple[Array, Array]:
        """(abar where the step ends, sigma)."""
        if step == "ddim_reverse_sample":
            return self.after, np.zeros_like(self.after)
        a, b = self.abar, self.before
        return b, eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)

    def _implicit(self, rows: Array, end: Array, sigma: Array) -> None:
        direction = np.sqrt(1 - end - sigma**2)
        noise = np.sqrt(1 / self.abar - 1)
        rows[:, Column.C_X] = direction * np.sqrt(1 / self.abar) / noise
        rows[:, Column.C_0] = np.sqrt(end) - direction / noise
        rows[:, Column.SIGMA] = sigma


def network_times(diffusion: Any) -> list[int] | list[float]:
    """What the network is told at each index: the training schedule's, scaled where they do."""
    mapping = getattr(diffusion, "timestep_map", None)
    total = diffusion.num_timesteps if mapping is None else diffusion.original_num_steps
    times = [int(t) for t in (range(total) if mapping is None else mapping)]
    # their product is one of float32 numbers
    scaled = torch.tensor(times).float() * (1000.0 / total)
    return [float(t) for t in scaled] if diffusion.rescale_timesteps else times
