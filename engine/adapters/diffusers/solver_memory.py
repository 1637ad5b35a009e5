"""Solvers of diffusers that look back: ``model_outputs`` in the slots that `denoise_step` reads.

While rows do the steps, what diffusers keeps in ``model_outputs`` stands in one tensor [K, N, ...],
K being ``solver_order``. Whoever reads or sets that list gets diffusers' own: the slots are copied
to it, and the next step takes them from there again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.adapters.diffusers.solver_base import Solver, Steps
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.layout import laid_out, layout_of
from stepfuse.kernels.registration import records_gradient


@dataclass
class Memory:
    """What was remembered since step ``first``, ready for step ``next``.

    ``slots`` is float32 [K, N, C, ...]; ``dtype`` that of the model's outputs; ``before`` what
    stood in diffusers' list before all that.
    """

    first: int
    next: int
    slots: Tensor
    dtype: torch.dtype
    before: list[Any]

    def ago(self, k: int) -> Tensor:
        """What was remembered k times ago, k = 1 .. K."""
        return self.slots[(self.next - self.first - k) % len(self.slots)]

    def continues(self, index: int, past: int, x: Tensor) -> bool:
        """Whether step ``index``, with so many to look back to, is the next one, of such an x."""
        slots, count = self.slots, min(self.next - self.first, len(self.slots))
        like = (slots.shape[1:], slots.device, self.dtype) == (x.shape, x.device, x.dtype)
        return like and self.next == index and 0 < past == count


class MemorySolver(Solver):
    """The base of these, beside a scheduler of diffusers."""

    num_inference_steps: int | None
    lower_order_nums: int
    _init_step_index: Any
    _memory: Memory | None = None
    _list = "model_outputs"  # the attribute where diffusers has it
    _from_start = False  # rows are those of a loop from step 0, whatever is remembered of it

    @property
    def model_outputs(self) -> list[Any]:
        """The last ``solver_order`` predictions, as diffusers has them."""
        return self._listed()

    @model_outputs.setter
    def model_outputs(self, listed: list[Any]) -> None:
        self._exchange(listed)

    def _listed(self) -> list[Any]:
        """diffusers' list, which the next step goes by."""
        self._hand_back()
        listed: list[Any] = self.__dict__[self._list]
        return listed

    def _exchange(self, listed: list[Any]) -> None:
        self._memory = None
        self.__dict__[self._list] = listed

    @property
    def _keep(self) -> int:  # type: ignore[override]
        return int(self.config.solver_order)

    def _hand_back(self) -> None:
        """Turn the slots into diffusers' list."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        order = len(memory.slots)
        count = min(memory.next - memory.first, order)
        kept = [memory.ago(k).to(memory.dtype, copy=True) for k in range(count, 0, -1)]
        self.__dict__[self._list] = [*memory.before, *kept][-order:]

    def _ready(self, sample: Any, output: Any, timestep: Any) -> Steps | None:
        """The rows, with the memory of the steps before; None where the original has to run."""
        if self.num_inference_steps is None or not self._fits(sample, output):
            return None
        if sample.dtype is not output.dtype:
            return None
        if self.step_index is None:
            self._init_step_index(timestep)
        index, past = self._step_index, self.lower_order_nums
        assert index is not None
        memory = self._memory
        if memory is None or not memory.continues(index, past, sample):
            memory = self._recalled(index, past, sample)
        steps: Steps | None = None
        if memory is not None:
            steps = self._steps(memory.first, sample.device)
        if steps is not None and memory is not None and index - memory.first < len(steps.terms):
            self._memory = memory
            return steps
        return None

    def _recalled(self, index: int, past: int, sample: Tensor) -> Memory | None:
        """A memory filled from ``model_outputs``; None where that holds something else."""
        self._hand_back()
        order, listed = self._keep, self.__dict__[self._list]
        past = min(past, order)
        if past > index or len(listed) < past:
            return None
        before = listed[len(listed) - past :]
        if not all(isinstance(m, Tensor) and m.shape == sample.shape for m in before):
            return None
        if records_gradient(before):
            return None
        with torch.inference_mode(False):  # written to in a later step outside, too
            slots = torch.empty(
                (order * len(sample), *sample.shape[1:]),
                dtype=torch.float32,
                device=sample.device,
                memory_format=layout_of(sample),
            ).view(order, *sample.shape)
            earlier = listed[: len(listed) - past]
            first = 0 if self._from_start else index - past
            memory = Memory(first, index, slots, sample.dtype, earlier)
            for k, value in enumerate(reversed(before), 1):
                memory.ago(k).copy_(value)
        return memory

    def _advance(
        self,
        steps: Steps,
        sample: Tensor,
        output: Tensor,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x_s, in the dtype of the output; what is remembered is remembered."""
        memory, index = self._memory, self._step_index
        assert memory is not None
        assert index is not None
        x_s = by_row(memory, steps, index - memory.first, sample, output, noise)
        self.lower_order_nums = min(self.lower_order_nums + 1, self._keep)
        self._step_index = index + 1
        return x_s


def by_row(
    memory: Memory,
    steps: Steps,
    number: int,
    sample: Tensor,
    output: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """x_s by row ``number``, in the dtype of the output; the memory has what the row remembers."""
    x_s: Any = denoise_step(
        laid_out(sample, layout_of(memory.slots[0])),
        output,
        steps.table,
        steps.numbers[number, :1],
        noise=noise,
        history=memory.slots,
        history_table=steps.history,
    )
    memory.next += steps.terms[number].remember is not None
    found: Tensor = x_s.to(output.dtype)
    return found
