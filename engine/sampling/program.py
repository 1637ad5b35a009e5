"""One sampler step on static buffers: what a captured graph replays.

A `Program` is built for a shape; its table, counter, seeds, condition and images live in buffers
that never move. `Program.advance` reads the row its counter points at, so that the same recorded
operations serve every timestep, every schedule and every seed.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfuse.engine.replay.capture import untouched
from stepfuse.engine.sampling.condition import Staged, structure_key
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.evaluation import Evaluation
from stepfuse.engine.sampling.guidance.protocol import Outputs, Steering
from stepfuse.engine.sampling.plan import Plan
from stepfuse.engine.sampling.request import Part
from stepfuse.engine.sampling.uncapturable import refusal
from stepfuse.kernels import torch_names
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.memory import history_dtype
from stepfuse.kernels.step_row import COLUMNS, HISTORY_COLUMNS, Column


@dataclass(frozen=True)
class Layout:
    """What fixes the recorded operations of a step; two runs of one layout share a program."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    given_noise: bool
    masked: bool
    training: bool
    condition: Hashable
    autocast: torch.dtype | None = None
    slots: int = 0  # of the history
    whole: bool = True  # timesteps are int64, and floats otherwise
    measured: tuple[int, ...] | None = None  # the shape of the measurement

    @classmethod
    def of(cls, part: Part, denoiser: Denoiser, plan: Plan) -> Layout:
        """The layout of a batch; conditions count by structure, shapes, dtypes and settings."""
        x = part.x
        return cls(
            tuple(x.shape),
            x.dtype,
            x.device,
            part.noise is not None,
            part.mask is not None,
            denoiser.module is not None and denoiser.module.training,
            structure_key((part.condition, part.replacement)),
            _autocast(x.device.type),
            plan.slots,
            plan.whole,
            None if part.measurement is None else tuple(part.measurement.shape),
        )


def _autocast(kind: str) -> torch.dtype | None:
    """The dtype that autocast has for operators on this type of device; None where it is off."""
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class Program:
    """Static buffers for one layout, and one step over them.

    Args:
        layout: shapes and dtypes.
        staged: the buffers of the condition.
        capacity: most rows a table can have.
        learned_variance: the update uses the second half of the model's channels.
        mean_guidance: a classifier's gradient shifts the mean (DDPM) instead of epsilon (DDIM).
        backend: of `denoise_step`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance: Steering | None,
        layout: Layout,
        staged: Staged,
        capacity: int,
        learned_variance: bool,
        mean_guidance: bool,
        backend: str,
    ) -> None:
        self.denoiser, self.guidance, self.layout = denoiser, guidance, layout
        self.learned_variance, self.backend = learned_variance, backend
        self.staged = staged
        with torch.inference_mode(False):  # buffers can be written to outside of it, too
            self._make_buffers(capacity)
        self._evaluation = Evaluation(
            denoiser,
            staged,
            self.table,
            self.step,
            layout.shape[0],
            learned_variance,
            mean_guidance,
            self.measurement,
        )

    def _make_buffers(self, capacity: int) -> None:
        layout = self.layout
        shape, device = layout.shape, layout.device
        self.x = torch.zeros(shape, dtype=layout.dtype, device=device)
        self.x0 = torch.zeros_like(self.x)
        self.noise = torch.zeros_like(self.x) if layout.given_noise else None
        self.image = torch.zeros_like(self.x) if layout.masked else None
        self.image_noise = torch.zeros_like(self.x) if layout.masked else None
        self.mask = torch.zeros_like(self.x) if layout.masked else None
        precise = history_dtype(layout.dtype)
        self.measurement = None
        if layout.measured is not None:
            self.measurement = torch.zeros(layout.measured, dtype=precise, device=device)
        self.table = torch.zeros((capacity, COLUMNS), dtype=precise, device=device)
        self.history = self.history_table = None
        if layout.slots:
            self.history = torch.zeros((layout.slots, *shape), dtype=precise, device=device)
            self.history_table = torch.zeros(
                (capacity, HISTORY_COLUMNS), dtype=precise, device=device
            )
        kind = torch.int64 if layout.whole else precise
        self.timesteps = torch.zeros(capacity, dtype=kind, device=device)
        self.rows = 0
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.t = torch.zeros(shape[0], dtype=kind, device=device)
        self.seeds = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.samples = torch.zeros_like(self.seeds)

    def load(self, part: Part, plan: Plan) -> None:
        """Set everything a run needs; copies into the buffers, keeps none of the arguments.

        What is in the history is never read before it was written, and stays as it is.
        """
        self.rows = len(plan.table)
        self.table[: self.rows].copy_(plan.table)
        if self.history_table is not None:
            assert plan.history is not None
            self.history_table[: self.rows].copy_(plan.history)
        timesteps = torch.tensor(plan.timesteps, dtype=self.timesteps.dtype)
        self.timesteps[: self.rows].copy_(timesteps)
        self.step.fill_(part.first_row)
        for buffer, value in (
            (self.x, part.x),
            (self.seeds, part.seeds),
            (self.samples, part.samples),
            (self.image, part.image),
            (self.image_noise, part.image_noise),
            (self.mask, part.mask),
            (self.measurement, part.measurement),
        ):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        self.staged.load(part.condition, part.replacement)

    def take_noise(self, noise: Tensor) -> None:
        """The caller's noise for the next step, [N, C, ...]."""
        assert self.noise is not None
        self.noise.copy_(noise)

    def advance(self, guided: bool) -> None:
        """Denoise, update, count; nothing here reads a tensor on the host.

        ``guided=False`` leaves out the second evaluation where the guidance scale is 1.
        """
        torch.index_select(self.timesteps, 0, self.step.expand(self.t.shape), out=self.t)
        made = self._outputs(guided)
        shift = made.shift
        if shift is not None and torch_names.is_alias_of(shift, self.x):
            shift = shift.clone()  # the update writes over x
        denoise_step(
            self.x,
            self._apart(made.model),
            self.table,
            self.step,
            uncond_output=None if made.unguided is None else self._apart(made.unguided),
            noise=self.noise,
            seed=None if self.noise is not None else self.seeds,
            sample=self.samples,
            learned_variance=self.learned_variance,
            out=self.x,
            x0_out=self.x0,
            history=self.history,
            history_table=self.history_table,
            backend=self.backend,
        )
        if shift is not None:
            self.x.add_(shift)
        if self.mask is not None:
            self._replace_known()
        self.step.add_(1)

    @property
    def uncapturable(self) -> str:
        """Why the model or the guidance must not be in a captured step; empty where they may."""
        guidance = None if self.guidance is None else self.guidance.uncapturable
        return refusal(self.denoiser.model) or guidance or ""

    def state(self) -> tuple[Tensor, ...]:
        """The buffers a step changes."""
        buffers = (self.x, self.x0, self.step, self.t)
        return buffers if self.history is None else (*buffers, self.history)

    def outputs(self) -> tuple[Tensor, ...]:
        """The images that a step makes."""
        return (self.x, self.x0)

    def to_other_step(self, repeat: int) -> None:
        """Go to the last ``repeat`` rows of the table."""
        self.step.fill_(self.rows - repeat)

    @property
    def device(self) -> torch.device:
        """Of the buffers."""
        return self.layout.device

    def kept(self) -> AbstractContextManager[None]:
        """Do steps inside and be where it was before on leaving, the guidance's tensors too."""
        return untouched((*self.state(), *(self.guidance.held() if self.guidance else ())))

    def nbytes(self) -> int:
        """Bytes of the static buffers."""
        tensors = [v for v in vars(self).values() if isinstance(v, Tensor)]
        return sum(v.nbytes for v in tensors) + self.staged.nbytes()

    def _outputs(self, guided: bool) -> Outputs:
        if guided and self.guidance is not None:
            return self.guidance.outputs(self._evaluation, self.x, self.t, self.staged.condition)
        return Outputs(self._evaluation(self.x, self.t, self.staged.condition))

    def _apart(self, output: Tensor) -> Tensor:
        """A model's output, copied where it is another view of x, over which the update writes."""
        one_memory = torch_names.is_alias_of(output, self.x)
        return output.clone() if one_memory and output.stride() != self.x.stride() else output

    def _replace_known(self) -> None:
        """Where the mask is 0, x_s becomes the given image noised to s (RePaint, eq. 8a)."""
        assert self.image is not None
        assert self.image_noise is not None
        assert self.mask is not None
        row = self._evaluation.row
        known = row[Column.SIGNAL_NEXT] * self.image + row[Column.NOISE_NEXT] * self.image_noise
        self.x.copy_(torch.where(self.mask > 0.5, self.x, known.to(self.x.dtype)))
