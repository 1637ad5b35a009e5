"""`DPMSolverMultistepScheduler` of diffusers, its update done by `denoise_step`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from stepfuse.engine.adapters.diffusers.solver_memory import MemorySolver
from stepfuse.engine.sampling.multistep import SHORT, dpmpp
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms

_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")


class DPMSolverMultistepScheduler(MemorySolver, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++ (Lu et al. 2022b) as ``diffusers.DPMSolverMultistepScheduler``.

        x_s = c_x x + c_0 m0 + c_1 m1 + c_2 m2 + sigma z    `stepfuse.engine.sampling.multistep`

    Parameters, timesteps, attributes and seeded results are diffusers'. "dpmsolver" and
    "sde-dpmsolver", thresholding, a learned variance and flow matching run the original step.
    ``strict=False``: order 3 is of third order, where diffusers halves a second difference.
    """

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """Why no row does what this configuration says; None where rows do."""
        if config.algorithm_type not in _ALGORITHMS:
            kind, accepted = config.algorithm_type, ", ".join(_ALGORITHMS)
            return f"algorithm_type {kind!r} is none of {accepted}"
        if config.variance_type is not None:
            return f"variance_type {config.variance_type!r} is a part of the model's output"
        return super().refusal(config)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x_s.

        model_output, sample: [N, C, ...]; timestep: one of ``timesteps``; generator: draws z of the
        SDE in float32, also for a last step that adds none; variance_noise: z itself. Returns
        ``prev_sample``, as a tuple with ``return_dict=False``. Raises ValueError without
        ``set_timesteps`` before.
        """
        steps = self._ready(sample, model_output, timestep)
        if steps is None:
            theirs = (generator, variance_noise, return_dict)
            return super().step(model_output, timestep, sample, *theirs)
        noise = None
        if self._stochastic:
            noise = variance_noise
            if noise is None:
                noise = self._noise(model_output, torch.float32, generator)
            noise = noise.to(model_output.device, torch.float32).expand(sample.shape)
            sample = sample.float()  # for the noise to stay as it was drawn
        x_s = self._advance(steps, sample, model_output, noise)
        return SchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)

    @property
    def _stochastic(self) -> bool:
        return bool(self.config.algorithm_type == "sde-dpmsolver++")

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        config = self.config
        return dpmpp(
            points,
            config.solver_order,
            config.solver_type,
            stochastic=self._stochastic,
            lower_order_final=config.lower_order_final and len(self.timesteps) < SHORT,
            euler_at_final=config.euler_at_final,
            strict=self.strict,
        )
