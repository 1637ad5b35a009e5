"""Sampling loops: ours, diffusers', and a plain one around another runtime's network."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from stepfuse.bench.peers import Call
from stepfuse.bench.workload import Workload
from stepfuse.engine.sampling.sampler import Sampler

Draws = Literal["philox", "generator"]


class Loop(Protocol):
    """A candidate at one batch size, ready to make its images."""

    draws: Draws  # whose noise it adds where eta > 0: `Sampler`'s or that of torch.Generator

    def prepare(self, steps: int) -> None:
        """Set the number of steps; not timed."""

    def images(self) -> Tensor:
        """The whole loop from the workload's x_T: [N, C, H, W]. Timed."""

    def wake(self) -> None:
        """One evaluation of the network, so that threads and processor are at work."""


class SamplerLoop:
    """`Sampler.sample` from x_T; a condition of None is the workload's own."""

    draws: Draws = "philox"

    def __init__(
        self,
        workload: Workload,
        batch: int,
        sampler: Sampler,
        condition: dict[str, Tensor] | None = None,
    ) -> None:
        self.sampler, self.spacing, self.seed = sampler, workload.spec.spacing, workload.spec.seed
        self.x_T = workload.x_T(batch)
        self.condition = workload.condition(batch) if condition is None else condition
        self.t = workload.t(batch)

    def prepare(self, steps: int) -> None:
        if steps != len(self.sampler.timesteps):
            self.sampler.set_timesteps(steps, self.spacing)

    def images(self, noise: Tensor | None = None) -> Tensor:
        """``noise`` [S, N, C, H, W] instead of that of the seed."""
        return self.sampler.sample(
            self.x_T.shape, self.seed, condition=self.condition, x_T=self.x_T, noise=noise
        )

    @torch.no_grad()
    def wake(self) -> None:
        self.sampler.denoiser(self.x_T, self.t, self.condition)


def plain_loop(workload: Workload, batch: int, call: Call) -> SamplerLoop:
    """Our loop, step by step in Python and with nothing captured, around ``call(x, t)``.

    It adds our update to the network, and that is less than any library's own loop does.
    """

    def model(x: Tensor, t: Tensor) -> Tensor:
        return call(x, t)

    sampler = workload.sampler(model, steps=workload.spec.steps, graph=None)
    return SamplerLoop(workload, batch, sampler, {})


class DiffusersLoop:
    """The lines of diffusers' DDIMPipeline and DDPMPipeline around ``call(x, t)``.

    The pipelines themselves take no labels and no x_T; conversion to pictures is left out.
    """

    draws: Draws = "generator"

    def __init__(self, workload: Workload, batch: int, call: Call) -> None:
        self.call, self.scheduler = call, scheduler(workload)
        self.seed, self.eta = workload.spec.seed, workload.spec.eta
        self.x_T, self.t = workload.x_T(batch), workload.t(batch)
        self.ddim = workload.spec.method == "ddim"
        self.prepare(workload.spec.steps)

    def prepare(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps, device=self.x_T.device)
        self.timesteps = list(self.scheduler.timesteps)

    @torch.no_grad()
    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        settings: dict[str, Any] = {"generator": generator}
        if self.ddim:
            settings["eta"] = self.eta
        image = self.x_T
        for t in self.timesteps:
            output = self.call(image, t.repeat(len(image)))
            image = self.scheduler.step(output, t, image, **settings).prev_sample
        return image

    @torch.no_grad()
    def wake(self) -> None:
        self.call(self.x_T, self.t)


def scheduler(workload: Workload) -> Any:
    """diffusers' scheduler with the schedule and the settings of the workload."""
    import diffusers

    spec = workload.spec
    settings = {
        "num_train_timesteps": workload.schedule.num_train_timesteps,
        "trained_betas": workload.schedule.betas.float().numpy(),
        "prediction_type": workload.prediction_type,
        "clip_sample": True,
        "timestep_spacing": spec.spacing,
    }
    if spec.method == "ddim":
        return diffusers.DDIMScheduler(steps_offset=0, **settings)
    return diffusers.DDPMScheduler(variance_type="fixed_small", **settings)


def why_no_scheduler(workload: Workload) -> str:
    """Why diffusers has no loop for these settings; empty where it has."""
    spec = workload.spec
    if spec.method not in ("ddim", "ddpm"):
        return f"diffusers has no scheduler for --method {spec.method}"
    # its DDIM steps go T // S back, wherever the next timestep is
    accepted = ("leading", "trailing") if spec.method == "ddim" else ("leading",)
    if spec.spacing not in accepted:
        return f"diffusers' {spec.method} has no --spacing {spec.spacing} that ends where it should"
    if workload.learned_variance:
        return "the network's output has a variance, which diffusers' DDIM and DDPM loops drop"
    return ""


def generator_noise(workload: Workload, batch: int) -> Tensor | None:
    """What `DiffusersLoop` draws, [S, N, C, H, W]; None where it draws nothing.

    DDIM draws in every step where eta > 0, DDPM in every step but that at timestep 0; no update
    takes noise there.
    """
    spec = workload.spec
    if spec.method == "ddim" and spec.eta == 0:
        return None
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (batch, *workload.shape)
    rows = [
        torch.zeros(shape) if t == 0 else torch.randn(shape, generator=generator)
        for t in workload.timesteps
    ]
    return torch.stack(rows).to(workload.device)
