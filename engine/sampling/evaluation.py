"""The model in one step, as a guidance sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.sampling.condition import Staged
from stepfuse.engine.sampling.denoiser import Condition, Denoiser
from stepfuse.kernels.step_row import Column


class Evaluation:
    """Call it to evaluate the model: ``denoiser(x, t, condition)`` is [N, C or 2C, ...].

    Whatever it gives is a tensor on the device, read anew in every step, so that a captured step
    follows the table and the conditions of the next run.

    Attributes:
        shifts_mean: whether a gradient of log p(y | x_t) belongs on the mean of the step (DDPM) or
            on epsilon (DDIM).
        learned_variance: whether the model's second half of channels is a variance.
        measurement: y [N, ...] that the caller gave, in float32 or the dtype of x if that is wider;
            None where none was.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        staged: Staged,
        table: Tensor,
        step: Tensor,
        count: int,
        learned_variance: bool,
        shifts_mean: bool,
        measurement: Tensor | None = None,
    ) -> None:
        self._denoiser, self._staged, self._table, self._step = denoiser, staged, table, step
        self._count = count
        self.learned_variance, self.shifts_mean = learned_variance, shifts_mean
        self.measurement = measurement

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The model's raw output for x [N, C, ...] and t int64 [N]."""
        return self._denoiser(x, t, condition)

    @property
    def unconditional(self) -> dict[str, Any]:
        """The condition with the entries that the guidance's ``unconditional`` replaces."""
        return self._staged.unconditional

    @property
    def both(self) -> dict[str, Any]:
        """The unconditional half and the conditional one, in tensors of twice the batch."""
        return self._staged.both

    @property
    def takes_both(self) -> bool:
        """Whether ``both`` can be had, and the model takes a batch of twice the size."""
        return self._staged.takes_both and self._denoiser.takes_batch(2 * self._count)

    @property
    def row(self) -> Tensor:
        """The step's numbers [16] by `Column`: sqrt(abar) is ``denoiser.row[Column.SIGNAL]``."""
        return torch.index_select(self._table, 0, self._step)[0]

    def variance(self, x: Tensor, output: Tensor) -> Tensor:
        """Of the reverse step: a number, or [N, C, ...] where the model's ``output`` gives it."""
        row = self.row
        if not self.learned_variance:
            return row[Column.VARIANCE]
        half = output[:, x.shape[1] :].to(row.dtype)
        return torch.exp(row[Column.L_0] + row[Column.L_1] * half)
