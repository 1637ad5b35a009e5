"""`PNDMScheduler` of diffusers without its Runge-Kutta steps, its update done by `denoise_step`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from stepfuse.engine.adapters.diffusers.listed import place_in
from stepfuse.engine.adapters.diffusers.solver_base import Steps
from stepfuse.engine.adapters.diffusers.solver_memory import Memory, MemorySolver, by_row
from stepfuse.engine.sampling.methods.plms import plms
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms


class PNDMScheduler(MemorySolver, diffusers.PNDMScheduler):  # type: ignore[misc]
    """PLMS (Liu et al. 2022) as ``diffusers.PNDMScheduler`` with ``skip_prk_steps``.

        x_s = c_x x + c_o o + c_1 o1 + c_2 o2 + c_3 o3     `stepfuse.engine.sampling.methods.plms`

    Parameters, timesteps, attributes and results are diffusers', but that ``ets`` holds three of
    the four outputs, those that are used again. Without ``skip_prk_steps``, and for a loop that
    begins later than at the first timestep or whose timesteps are not T // S apart, the original
    steps.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    counter: int
    cur_sample: Any
    _predictions = ("epsilon", "v_prediction")
    _levels = "alphas_cumprod"
    _list = "ets"
    _from_start = True
    _keep = 3

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """Why no row does what this configuration says; None where rows do."""
        if not config.skip_prk_steps:
            return "skip_prk_steps is off"
        return super().refusal(config)

    @property
    def ets(self) -> list[Any]:
        """The model's outputs that later steps use, as diffusers has them."""
        return self._listed()

    @ets.setter
    def ets(self, listed: list[Any]) -> None:
        self._exchange(listed)

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """From x_t to x_s, what ``step`` does after the Runge-Kutta steps.

        model_output, sample: [N, C, ...]; timestep: one of ``timesteps``. Returns ``prev_sample``,
        as a tuple with ``return_dict=False``. Raises ValueError without ``set_timesteps`` before.
        """
        x = self.cur_sample if self.counter == 1 else sample
        steps = self._next(x, model_output, timestep)
        if steps is None:
            self._hand_back()
            return super().step_plms(model_output, timestep, sample, return_dict)
        assert self._memory is not None
        # the second step is the first again, from the same x
        self.cur_sample = sample if self.counter == 0 else None
        x_s = by_row(self._memory, steps, self.counter, x, model_output)
        self.counter += 1
        return SchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)

    def _next(self, x: Any, output: Any, timestep: Any) -> Steps | None:
        """The rows, with the memory of the steps before; None where the original has to run."""
        if self.num_inference_steps is None or not self._fits(x, output):
            return None
        if x.dtype is not output.dtype or not self._is_next(timestep):
            return None
        memory: Memory | None = self._memory
        pushed = self.counter - (self.counter > 1)
        if memory is None or not memory.continues(pushed, min(pushed, self._keep), x):
            if pushed != len(self.__dict__[self._list]) and pushed < self._keep:
                return None
            memory = self._recalled(pushed, pushed, x)
        steps: Steps | None = self._steps(0, x.device)
        if memory is None or steps is None or self.counter >= len(steps.terms):
            return None
        self._memory = memory
        return steps

    def _is_next(self, timestep: Any) -> bool:
        """Whether the timestep is the entry of the list whose turn it is."""
        listed, place = self.timesteps, self.counter
        if place >= len(listed):
            return False
        if isinstance(timestep, Tensor) and not timestep.is_cpu:
            return place_in(timestep, listed) == place
        return listed.is_cpu and bool(timestep == listed[place])

    def _options(self) -> tuple[Any, ...]:
        return (float(self.final_alpha_cumprod),)

    def _points(self) -> Points | None:
        listed, abar = self.timesteps.cpu(), self.alphas_cumprod.double().cpu()
        assert self.num_inference_steps is not None
        if len(listed) > 1 and listed[1] != listed[2]:
            return None
        listed = torch.cat([listed[:1], listed[2:]])
        stride = self.config.num_train_timesteps // self.num_inference_steps
        end = listed[-1:] - stride
        apart = bool((listed.diff() == -stride).all()) and bool((listed < len(abar)).all())
        if not apart or int(listed[-1]) < 0:
            return None
        last = torch.where(end >= 0, abar[end.clamp(min=0)], self.final_alpha_cumprod.double())
        ends = torch.cat([abar[listed], last])
        return Points(listed, ends.sqrt(), (1 - ends).sqrt())

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        terms = plms(points, self.config.prediction_type)
        if len(terms) > 1:  # from the x that the first step had, which diffusers keeps
            terms[1].x = terms[0].x
            terms[1].look_back(1, terms[0].out)
        return terms
