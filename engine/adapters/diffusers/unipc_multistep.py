"""`UniPCMultistepScheduler` of diffusers, its update done by `denoise_step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from stepfuse.engine.adapters.diffusers.listed import version
from stepfuse.engine.adapters.diffusers.solver_memory import Memory, MemorySolver
from stepfuse.engine.sampling.methods.unipc import unipc
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms


@dataclass
class _Predicted:
    """The last x_s, by which the next row knows what to correct.

    ``given`` is the tensor that was returned, and its version then; ``kept`` a copy of it;
    ``terms`` what it was made of, the corrected x before it and what is remembered.
    """

    given: Tensor
    version: int
    kept: Tensor
    terms: Terms

    def is_still(self, sample: Tensor) -> bool:
        """Whether ``sample`` is what was returned, and nobody wrote to it.

        Tensors of inference mode do not tell.
        """
        same = sample is self.given and not sample.is_inference()
        return same and version(sample) == self.version

    def corrected(self, memory: Memory) -> Tensor:
        """The x before it, solved for."""
        x = self.kept.float() - self.terms.x0 * memory.ago(1)
        for ago, weight in self.terms.history.items():
            x = x - weight * memory.ago(ago + 1)
        return (x / self.terms.x).to(self.kept.dtype)


class UniPCMultistepScheduler(MemorySolver, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC (Zhao et al. 2023) as ``diffusers.UniPCMultistepScheduler``, corrected by the same row.

        x_s = c_x x + c_0 m0 + c_1 m1 + c_2 m2 + c_3 m3    `stepfuse.engine.sampling.methods.unipc`

    Parameters, timesteps, attributes and results are diffusers', also where a pipeline or a
    callback replaces or changes x between two steps. ``solver_p``, ``predict_x0=False``,
    thresholding and flow matching run the original step, and so does what ends in NaN there ("bh1",
    or ``lower_order_final=False``, down to a sigma of 0), which ``strict=False`` computes.
    """

    predict_x0: bool
    solver_p: Any
    disable_corrector: Any
    this_order: int
    timestep_list: list[Any]
    _predicted: _Predicted | None = None

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """Why no row does what this configuration says; None where rows do."""
        if config.solver_p is not None:
            return "solver_p is another scheduler"
        if not config.predict_x0:
            return "predict_x0 is off"
        return super().refusal(config)

    @property
    def last_sample(self) -> Tensor | None:
        """The corrected x that the last step started from, as diffusers has it."""
        self._hand_back()
        found: Tensor | None = self.__dict__["last_sample"]
        return found

    @last_sample.setter
    def last_sample(self, value: Tensor | None) -> None:
        self._hand_back()
        self.__dict__["last_sample"] = value

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """From x_t to x_s.

        model_output, sample: [N, C, ...]; timestep: one of ``timesteps``. Returns ``prev_sample``,
        as a tuple with ``return_dict=False``. Raises ValueError without ``set_timesteps`` before.
        """
        steps = None
        if self.predict_x0 and self.solver_p is None:
            steps = self._ready(sample, model_output, timestep)
        if steps is None:
            return super().step(model_output, timestep, sample, return_dict)
        memory, predicted, index = self._memory, self._predicted, self._step_index
        assert memory is not None
        assert index is not None
        if predicted is not None and not predicted.is_still(sample):
            # x0 is that of the x that came, the correction that of the x that was predicted
            model_output = self.convert_model_output(model_output, sample=sample)
            steps = self._steps(memory.first, sample.device, prediction="sample")
            sample = predicted.kept
        x_s = self._advance(steps, sample, model_output)
        left = len(self.timesteps) - index if self.config.lower_order_final else self._keep
        self.this_order = min(left, self._keep, index - memory.first + 1)
        self.timestep_list = [*self.timestep_list[1:], timestep]
        terms = steps.predictor[index - memory.first]
        self._predicted = _Predicted(x_s, version(x_s), x_s.clone(), terms)
        return SchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)

    def _recalled(self, index: int, past: int, sample: Tensor) -> Memory | None:
        """A new memory at the start of a loop; what diffusers began it goes on with."""
        if past or self.last_sample is not None:
            return None
        self._predicted = None
        return super()._recalled(index, past, sample)

    def _hand_back(self) -> None:
        memory, predicted = self._memory, self._predicted
        if memory is not None and predicted is not None:
            self.__dict__["last_sample"] = predicted.corrected(memory)
        self._predicted = None
        super()._hand_back()

    def _options(self) -> tuple[Any, ...]:
        return tuple(self.disable_corrector)

    def _points(self) -> Points | None:
        config = self.config
        ends = config.solver_type == "bh1" or (
            config.solver_order > 1 and not config.lower_order_final
        )
        if self.strict and ends and not self.sigmas[-1]:
            return None  # 0 times infinity in diffusers
        return super()._points()

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        return self._unipc(points, [i - first for i in self.disable_corrector])

    def _predictor(self, points: Points) -> list[Terms]:
        return self._unipc(points, range(len(points)))

    def _unipc(self, points: Points, disabled: Any) -> list[Terms]:
        config = self.config
        return unipc(
            points,
            config.solver_order,
            config.solver_type,
            lower_order_final=config.lower_order_final,
            disable_corrector=disabled,
        )
