"""`HeunDiscreteScheduler` of diffusers, its update done by `denoise_step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from stepfuse.engine.adapters.diffusers.solver_base import Solver
from stepfuse.engine.sampling.methods.heun import heun
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.layout import laid_out, layout_of


@dataclass
class _Half:
    """After the first of two rows: ``kept`` is x + dt d / 2, float32 [1, N, C, ...]."""

    kept: Tensor
    next: int
    dtype: torch.dtype

    def is_like(self, x: Tensor) -> bool:
        """Whether x is of the shape, device and dtype that the first row had."""
        kept = self.kept
        return (kept.shape[1:], kept.device, self.dtype) == (x.shape, x.device, x.dtype)


class HeunDiscreteScheduler(Solver, diffusers.HeunDiscreteScheduler):  # type: ignore[misc]
    """Heun's steps (Karras et al. 2022, algorithm 1) as ``diffusers.HeunDiscreteScheduler``.

        x'  = x + (sigma_s - sigma) d                   the first of two rows, d = (x - x0) / sigma
        x_s = x + (sigma_s - sigma) (d + d') / 2        the second, d' being d at x'

    Parameters, timesteps, attributes and results are diffusers', but that nothing stays of the last
    step, which has the first row alone.
    """

    dt: Any
    sample: Any
    _init_step_index: Any
    _keep = 1
    _half: _Half | None = None

    @property
    def prev_derivative(self) -> Any:
        """d of the first of two rows, None before it."""
        half, self._half = self._half, None
        if half is not None:
            slope = (half.kept[0] - self.sample) * 2 / self.dt
            self.__dict__["prev_derivative"] = slope.to(half.dtype)
        return self.__dict__["prev_derivative"]

    @prev_derivative.setter
    def prev_derivative(self, value: Any) -> None:
        self._half = None
        self.__dict__["prev_derivative"] = value

    def step(
        self,
        model_output: Any,
        timestep: float | Tensor,
        sample: Any,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x', or from that to x_s.

        model_output, sample: [N, C, ...]; timestep: one of ``timesteps``. Returns ``prev_sample``
        and ``pred_original_sample``, as a tuple with ``return_dict=False``.
        """
        steps = self._ready(model_output, timestep, sample)
        if steps is None:
            return super().step(model_output, timestep, sample, return_dict)
        index, half, layout = self._step_index, self._half, layout_of(sample)
        assert index is not None
        if half is None:
            size = (1, *sample.shape)
            kept = torch.empty(size[1:], device=sample.device, memory_format=layout)[None]
        else:
            kept, layout = half.kept, layout_of(half.kept[0])
        x_s, x0 = denoise_step(
            laid_out(sample, layout),
            model_output,
            steps.table,
            steps.numbers[index, :1],
            return_x0=True,
            history=kept,
            history_table=steps.history,
        )
        if half is None and index + 1 < len(steps.terms):
            self.dt, self.sample = self.sigmas[index + 1] - self.sigmas[index], sample
            self._half = _Half(kept, index + 1, sample.dtype)
        else:
            self.prev_derivative = self.dt = self.sample = None
        self._step_index = index + 1
        x0 = model_output if self.config.prediction_type == "sample" and not self._clip() else x0
        if not return_dict:
            return x_s, x0
        return HeunDiscreteSchedulerOutput(prev_sample=x_s, pred_original_sample=x0)

    def _ready(self, output: Any, timestep: Any, sample: Any) -> Any:
        """The rows, with the step's index set; None where the original has to run."""
        if not self._fits(sample, output) or sample.dtype is not output.dtype:
            return None
        if self.step_index is None:
            self._init_step_index(timestep)
        index, half = self._step_index, self._half
        assert index is not None
        if half is None:
            if self.dt is not None or index % 2:  # in the middle of a step of the original's
                return None
        elif half.next != index or not half.is_like(sample):
            return None
        steps = self._steps(0, sample.device)
        return steps if steps is not None and index < len(steps.terms) else None

    def _points(self) -> Points | None:
        sigmas = torch.cat([self.sigmas[:1], self.sigmas[1:-1:2], self.sigmas[-1:]])
        falls = bool((sigmas.diff() < 0).all()) and bool(sigmas.isfinite().all())
        if not falls or len(self.sigmas) != 2 * len(sigmas) - 2:
            return None
        sigmas, listed = sigmas.double().cpu(), self.timesteps[::2].double().cpu()
        return Points(listed, torch.ones_like(sigmas), sigmas)

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        return heun(points)
