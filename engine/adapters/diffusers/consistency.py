"""`LCMScheduler` and `TCDScheduler` of diffusers, their updates by `denoise_step`.

Both predict an image, or one with less noise, and put noise on it again. What they predict is a
result too: the row writes it where solvers with a memory write what they remember.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from stepfuse.engine.adapters.diffusers.listed import place_in
from stepfuse.engine.adapters.diffusers.solver_base import Solver
from stepfuse.engine.sampling.methods.lcm import lcm
from stepfuse.engine.sampling.methods.tcd import tcd
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.layout import laid_out, layout_of


class _Consistency(Solver):
    """What the two share: points at their own timesteps, and a prediction beside x_s."""

    alphas_cumprod: Tensor
    num_inference_steps: int | None
    _init_step_index: Any
    _keep = 1
    _levels = "alphas_cumprod"

    def _listed(self) -> Tensor:
        return self.timesteps.cpu()

    def _points(self) -> Points | None:
        listed, abar = self._listed(), self.alphas_cumprod.double().cpu()
        inside = (listed >= 0) & (listed < len(abar))
        if not len(listed) or not bool(inside.all()) or not bool((listed.diff() < 0).all()):
            return None
        ends = torch.cat([abar[listed], self._end(abar)])
        if not bool((ends.diff() > 0).all()):
            return None
        return Points(listed, ends.sqrt(), (1 - ends).sqrt())

    def _end(self, abar: Tensor) -> Tensor:
        """abar where the last step ends, [1]."""
        return torch.ones_like(abar[:1])

    def _row(self, output: Any, timestep: Any, sample: Any, *options: Any) -> Any:
        """The rows, with the step's index set; None for what the original does."""
        steps = self.num_inference_steps
        if steps is None or steps != len(self.timesteps) or not self._fits(sample, output):
            return None
        if sample.dtype is not output.dtype:
            return None
        if self.step_index is None:
            self._init_step_index(timestep)
        # diffusers takes abar by the timestep, which need not be that of the index
        index = self._step_index
        if isinstance(timestep, Tensor) and not timestep.is_cpu:
            place = place_in(timestep, self.timesteps)
        else:
            place = index if timestep == self._listed()[index] else None
        return self._steps(0, sample.device, *options) if place == index else None

    def _update(
        self, steps: Any, output: Tensor, sample: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(x_s, the prediction), both in the dtype of x."""
        index, layout = self._step_index, layout_of(sample)
        assert index is not None
        kept = torch.empty(
            sample.shape, dtype=torch.float32, device=sample.device, memory_format=layout
        )
        x_s: Any = denoise_step(
            laid_out(sample, layout),
            output,
            steps.table,
            steps.numbers[index, :1],
            noise=noise,
            history=kept[None],
            history_table=steps.history,
        )
        self._step_index = index + 1
        return x_s, kept.to(sample.dtype)

    def _drawn(self, like: Tensor, generator: Any) -> Tensor | None:
        """z, which the last step has none of."""
        last = self._step_index == len(self.timesteps) - 1
        return None if last else self._noise(like, like.dtype, generator)


class LCMScheduler(_Consistency, diffusers.LCMScheduler):  # type: ignore[misc]
    """Sampling from a latent consistency model (Luo et al. 2023) as ``diffusers.LCMScheduler``.

        f   = c_skip x + c_out x0
        x_s = sqrt(abar_s) f + sqrt(1 - abar_s) z             f itself in the last step

    Parameters, timesteps, attributes and seeded results are diffusers'. Thresholding runs the
    original step.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x_s.

        model_output, sample: [N, C, ...]; timestep: one of ``timesteps``; generator: draws z.
        Returns ``prev_sample`` and ``denoised``, f, as a tuple with ``return_dict=False``. Raises
        ValueError without ``set_timesteps`` before.
        """
        steps = self._row(model_output, timestep, sample)
        if steps is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise = self._drawn(model_output, generator)
        x_s, denoised = self._update(steps, model_output, sample, noise)
        if not return_dict:
            return x_s, denoised
        return LCMSchedulerOutput(prev_sample=x_s, denoised=denoised)

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        terms = lcm(points, self.config.timestep_scaling)
        for row, image in zip(terms, lcm(points, self.config.timestep_scaling, False), strict=True):
            row.remember = (image.x, image.out, image.x0)
        return terms


class TCDScheduler(_Consistency, diffusers.TCDScheduler):  # type: ignore[misc]
    """Trajectory consistency distillation (Zheng et al. 2024) as ``diffusers.TCDScheduler``.

        x'  = a' x0 + s' eps                                   at timestep floor((1 - eta) s)
        x_s = (a_s / a') x' + sqrt(1 - (a_s / a')^2) z         x' itself in the last step

    Parameters, timesteps, attributes and seeded results are diffusers', which clips nothing here.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x_s.

        model_output, sample: [N, C, ...]; timestep: one of ``timesteps``; eta: 0 .. 1, the paper's
        gamma; generator: draws z where ``eta > 0``. Returns ``prev_sample`` and
        ``pred_noised_sample``, x', as a tuple with ``return_dict=False``. Raises ValueError without
        ``set_timesteps`` before, AssertionError for another eta.
        """
        steps = None
        if 0 <= eta <= 1:
            steps = self._row(model_output, timestep, sample, float(eta))
        if steps is None:
            return super().step(model_output, timestep, sample, eta, generator, return_dict)
        noise = self._drawn(model_output, generator) if eta > 0 else None
        x_s, noised = self._update(steps, model_output, sample, noise)
        if not return_dict:
            return x_s, noised
        return TCDSchedulerOutput(prev_sample=x_s, pred_noised_sample=noised)

    def _clip(self) -> float | None:
        return None

    def _end(self, abar: Tensor) -> Tensor:
        return abar[:1]

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        (eta,) = options
        following = torch.cat([points.timesteps[1:], torch.zeros(1, dtype=torch.float64)])
        between = ((1 - eta) * following.float()).floor().long()
        a = self.alphas_cumprod.double().cpu()[between]
        roots, terms = (a.sqrt(), (1 - a).sqrt()), []
        prediction = self._prediction(self.config)
        for row, ratio in zip(tcd(points, roots, prediction), self._ratios(points, a), strict=True):
            row.remember = (row.x / ratio, row.out / ratio, row.x0 / ratio)
            terms.append(row)
        return terms

    @staticmethod
    def _ratios(points: Points, a: Tensor) -> list[float]:
        """a_s / a', 1 in the last step."""
        ratios: list[float] = (points.signal[1:] / a.sqrt()).tolist()
        return [*ratios[:-1], 1.0]
