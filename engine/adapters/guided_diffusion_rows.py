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

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepfuse.engine.sampling import rows as writer
from stepfuse.kernels.step_row import Column

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
            means = writer.posterior_mean(self.abar, self.before, alphas, self.betas)
            self.c_0: Array = means[0]
            self.c_x: Array = means[1]
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
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return self._table(step, 1.0 if clip else None, eta)

    def _table(self, step: Step, limit: float | None, eta: float) -> Tensor:
        rows = writer.Rows(
            torch.arange(len(self.betas), device="cpu"), None, None, limit, self._scale
        )
        if self.mean_type == "EPSILON":
            rows.predict("epsilon")
        elif self.mean_type == "START_X":
            rows.predict("sample")
        else:
            rows.predict("mean", self._mean)
        if step == "p_sample":
            self._ancestral(rows)
        else:
            end, sigma = self._ends(step, eta)
            direction = np.sqrt(1 - end - sigma**2)
            b_root, weight, std = map(torch.from_numpy, (np.sqrt(end), direction, sigma))
            # whatever it predicts, epsilon is taken from the clipped x0
            rows.implicit(b_root, weight, std, rederive=True)
        return rows.table

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

    @property
    def _mean(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.c_0), torch.from_numpy(self.c_x)

    @property
    def _scale(self) -> writer.Scale:
        roots = np.sqrt(1 / self.abar), np.sqrt(1 / self.abar - 1)
        return writer.Scale.of_reciprocals(*map(torch.from_numpy, roots))

    def _ancestral(self, rows: writer.Rows) -> None:
        if self.mean_type == "PREVIOUS_X":
            rows.table[:, Column.C_O] = 1
        else:
            rows.ancestral(self._mean)
        rows.noised(torch.from_numpy(self.std))
        if self.learned:
            small, large = map(torch.from_numpy, (self.log_small, np.log(self.betas)))
            rows.learned(small, large, ranged=self.var_type == "LEARNED_RANGE")
        rows.table[0, Column.SIGMA] = 0

    def _ends(self, step: Step, eta: float) -> tuple[Array, Array]:
        """(abar where the step ends, sigma)."""
        if step == "ddim_reverse_sample":
            return self.after, np.zeros_like(self.after)
        a, b = self.abar, self.before
        return b, eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)


def network_times(diffusion: Any) -> list[int] | list[float]:
    """What the network is told at each index: the training schedule's, scaled where they do."""
    mapping = getattr(diffusion, "timestep_map", None)
    total = diffusion.num_timesteps if mapping is None else diffusion.original_num_steps
    times = [int(t) for t in (range(total) if mapping is None else mapping)]
    # their product is one of float32 numbers
    scaled = torch.tensor(times).float() * (1000.0 / total)
    return [float(t) for t in scaled] if diffusion.rescale_timesteps else times
