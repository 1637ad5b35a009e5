"""DDIM inversion, and the way back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.sampling.denoiser import Condition
from stepfuse.engine.sampling.plan import Plan, inversion_table, step_table
from stepfuse.engine.sampling.planned import Planned
from stepfuse.engine.sampling.request import Request, check_images
from stepfuse.engine.sampling.step import Step
from stepfuse.engine.sampling.update import Inversion


class Encoding(Planned):
    """The deterministic way from images to latents and back, of `stepfuse.Sampler`."""

    @abstractmethod
    def _request(self, shape: Sequence[int], *arguments: Any, **named: Any) -> Request:
        """The arguments of `Sampler.sample`, checked."""

    @abstractmethod
    def _run(
        self,
        request: Request,
        plan: Plan,
        batch_size: int | None,
        progress: bool,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Every part of a request, one after the other, into one tensor."""

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        condition: Condition | None = None,
        *,
        convention: Inversion = "current",
        clip_sample: float | None = None,
        progress: bool = False,
    ) -> Tensor:
        """DDIM inversion: the x_T, [N, C, ...], that `decode` turns back into x0 (section 4.3).

        ``convention`` says where the model is evaluated, see `inversion_table`; x0 is not clipped
        on the way unless ``clip_sample`` is given. Guidance is left out.
        """
        check_images("x0", x0)
        update = self.update.deterministic(clip_sample)
        table = inversion_table(self.schedule, self._whole(), update, convention)
        request = self._request(x0.shape, condition=condition, x_T=x0, guidance=None)
        return self._run(request, Plan.of(table), None, progress)

    @torch.no_grad()
    def decode(
        self, z: Tensor, condition: Condition | None = None, *, progress: bool = False
    ) -> Tensor:
        """The image of a latent: deterministic DDIM from z = x_T, without clipping or guidance."""
        check_images("z", z)
        update = self.update.deterministic(None)
        table = step_table(self.schedule, self._whole(), update)
        request = self._request(z.shape, condition=condition, x_T=z, guidance=None)
        return self._run(request, Plan.of(table), None, progress)
