"""Euler's schedulers of diffusers, their updates by `denoise_step`.

`EulerDiscreteScheduler` and the ancestral one keep x divided by the signal: x = x0 + sigma eps. Of
flow matching x = (1 - sigma) x0 + sigma eps.
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
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from stepfuse.engine.adapters.diffusers.solver_base import Solver
from stepfuse.engine.sampling.methods.euler import euler
from stepfuse.engine.sampling.methods.euler_a import euler_a
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms
from stepfuse.kernels.denoise_step import denoise_step


class _Euler(Solver):
    """What they share: one row a step, without memory."""

    is_scale_input_called = True
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

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
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

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        return euler_a(points)


class FlowMatchEulerDiscreteScheduler(_Euler, diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Euler's steps of flow matching (Lipman et al. 2023) as diffusers' scheduler of that name.

        x_s = x + (sigma_s - sigma) v

    Parameters, timesteps, attributes and results are diffusers'. ``stochastic_sampling`` and
    ``invert_sigmas`` run the original step.
    """

    _predictions = ("flow_prediction",)

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """Why no row does what this configuration says; None where rows do."""
        for name in ("stochastic_sampling", "invert_sigmas"):
            if getattr(config, name, False):
                return f"{name} is on"
        return None

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x_s; with ``per_token_timesteps`` by the original.

        model_output, sample: [N, ...]; timestep: one of ``timesteps``. The other arguments change
        nothing, in diffusers either. Returns ``prev_sample``, as a tuple with
        ``return_dict=False``. Raises ValueError for an integer timestep.
        """
        steps = None
        if per_token_timesteps is None:
            steps = self._row(model_output, timestep, sample)
        if steps is None:
            theirs = (s_churn, s_tmin, s_tmax, s_noise, generator, per_token_timesteps, return_dict)
            return super().step(model_output, timestep, sample, *theirs)
        index = self._step_index
        assert index is not None
        if sample.dtype is not model_output.dtype:
            sample = sample.float()
        x: Any = denoise_step(sample, model_output, steps.table, steps.numbers[index, :1])
        self._step_index = index + 1
        x_s = x.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)

    @staticmethod
    def _prediction(config: Any) -> str:
        return "flow_prediction"

    def _scaled(self, timesteps: Tensor, sigmas: Tensor) -> Points:
        return Points(timesteps, 1 - sigmas, sigmas)

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        sigmas = points.noise.tolist()
        return [Terms(i, i + 1, x=1.0, out=sigmas[i + 1] - sigmas[i]) for i in range(len(points))]
