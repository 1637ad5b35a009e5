"""`EulerDiscreteScheduler` and the ancestral one of diffusers, their updates by `denoise_step`.

x is divided by the signal, as they keep it: x = x0 + sigma eps.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import (
    EulerAncestralDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from stepfuse.engine.adapters.diffusers.solver_base import Solver
from stepfuse.engine.sampling.methods.euler import euler
from stepfuse.engine.sampling.methods.euler_a import euler_a
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms
from stepfuse.kernels.denoise_step import denoise_step


class _Euler(Solver):
    """What the two share: one row a step, without memory."""

    is_scale_input_called: bool
    _init_step_index: Any

    def _scaled(self, timesteps: Tensor, sigmas: Tensor) -> Points:
        return Points(timesteps, torch.ones_like(sigmas), sigmas)

    def _row(self, output: Any, timestep: Any, sample: Any) -> Any:
        """The rows, with the step's index set; None for what the original warns of or refuses."""
        if isinstance(timestep, (int, torch.IntTensor, torch.LongTensor)):
            return None
        if not (self.is_scale_input_called and self._fits(sample, output)):
            return None
        if self.step_index is None:
            self._init_step_index(timestep)
        return self._steps(0, sample.device)

    def _update(
        self, steps: Any, output: Tensor, sample: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(x_s in the dtype of the output, x0), all computed in float32."""
        index = self._step_index
        assert index is not None
        x_s, x0 = denoise_step(
            sample.float(),
            output,
            steps.table,
            steps.numbers[index, :1],
            noise=noise,
            return_x0=True,
        )
        self._step_index = index + 1
        return x_s.to(output.dtype), output if self.config.prediction_type == "sample" else x0


class EulerDiscreteScheduler(_Euler, diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """Euler's steps (Karras et al. 2022, algorithm 2) as ``diffusers.EulerDiscreteScheduler``.

        x_s = x + (sigma_s - sigma) (x - x0) / sigma

    Parameters, timesteps, attributes and results are diffusers'. ``interpolation_type``
    "log_linear", whose sigmas are not those of its timesteps, runs the original step.
    """

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """Why no row does what this configuration says; None where rows do."""
        if config.interpolation_type != "linear":
            return f"interpolation_type {config.interpolation_type!r} is not 'linear'"
        return super().refusal(config)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x_s; with ``s_churn``, which adds noise to x first, by the original.

        model_output, sample: [N, C, ...]; timestep: one of ``timesteps``. Returns ``prev_sample``
        and ``pred_original_sample``, as a tuple with ``return_dict=False``. Raises ValueError for
        an integer timestep.
        """
        steps = self._row(model_output, timestep, sample) if s_churn == 0 else None
        if steps is None:
            theirs = (s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)
            return super().step(model_output, timestep, sample, *theirs)
        x_s, x0 = self._update(steps, model_output, sample, None)
        if not return_dict:
            return x_s, x0
        return EulerDiscreteSchedulerOutput(prev_sample=x_s, pred_original_sample=x0)

    def _terms(self, points: Points, first: int) -> list[Terms]:
        return euler(points)


class EulerAncestralDiscreteScheduler(_Euler, diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """Ancestral steps as ``diffusers.EulerAncestralDiscreteScheduler``: the noise is its own, too.

        x_s = x + (sigma_down - sigma) (x - x0) / sigma + sigma_up z

    Parameters, timesteps, attributes and seeded results are diffusers'.
    """

    _predictions = ("epsilon", "v_prediction")

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x_s.

        model_output, sample: [N, C, ...]; timestep: one of ``timesteps``; generator: draws z, also
        for the last step, which adds none. Returns ``prev_sample`` and ``pred_original_sample``, as
        a tuple with ``return_dict=False``. Raises ValueError for an integer timestep.
        """
        steps = self._row(model_output, timestep, sample)
        if steps is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise = self._noise(model_output, model_output.dtype, generator)
        x_s, x0 = self._update(steps, model_output, sample, noise)
        if not return_dict:
            return x_s, x0
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=x_s, pred_original_sample=x0)

    def _terms(self, points: Points, first: int) -> list[Terms]:
        return euler_a(points)
