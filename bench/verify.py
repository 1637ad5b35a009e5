"""The images of a candidate against those of the eager float32 loop, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stepfuse.bench.loops import Draws, Loop, generator_noise
from stepfuse.bench.record import Verified
from stepfuse.bench.workload import Workload
from stepfuse.engine.export.parity import compare
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.plain_loop import plain_loop
from stepfuse.kernels import philox

# images in [-1, 1]: float32 sums in another order, through S clipped steps
MOST_DIFFERENCE = 2e-3
# dB for a range of 2: a loop takes apart what bfloat16 rounds, but the picture stays
LEAST_PSNR = 25.0


class Reference:
    """The images of the eager float32 network in the loop that the papers describe."""

    def __init__(self, workload: Workload, batch: int) -> None:
        self.workload, self.batch = workload, batch
        self._images: dict[Draws, Tensor] = {}

    def images(self, draws: Draws) -> Tensor:
        """From the same x_T and, where eta > 0, with the noise of `Sampler` or of a generator."""
        if draws not in self._images:
            workload, settings = self.workload, dict(self.workload.sampler_settings)
            del settings["spacing"]  # of the timesteps
            with torch.no_grad():
                self._images[draws] = plain_loop(
                    self._model,
                    workload.schedule,
                    workload.timesteps,
                    workload.x_T(self.batch),
                    self._noise(draws),
                    **settings,
                )
        return self._images[draws]

    def _model(self, x: Tensor, t: Tensor) -> Tensor:
        workload = self.workload
        return Denoiser(workload.network)(x, t.to(x.device), workload.condition(self.batch))

    def _noise(self, draws: Draws) -> Callable[[int], Tensor]:
        workload = self.workload
        if draws == "generator":
            drawn = generator_noise(workload, self.batch)
            zeros = torch.zeros_like(workload.x_T(self.batch))
            return lambda t: zeros if drawn is None else drawn[workload.timesteps.index(t)]
        numbers = torch.arange(self.batch, device=workload.device)
        return lambda t: philox.normal(
            workload.spec.seed, numbers, t, tuple(workload.shape), "reference"
        )

    def check(self, loop: Loop, dtype: str) -> tuple[Verified | None, str]:
        """What was found, and why it may not be timed; empty where it may."""
        found, exact = loop.images(), self.images(loop.draws)
        if found.shape != exact.shape:
            return None, f"its images have shape {list(found.shape)}, not {list(exact.shape)}"
        if not bool(torch.isfinite(found).all()):
            return None, "its images are not finite"
        return compared(found, exact, dtype)


def psnr(found: Tensor, exact: Tensor, least: float = -1.0) -> float:
    """Of images in [``least``, 1], clipped to it, in dB; infinite where they are equal."""
    return compare.psnr(found.clamp(least, 1), exact.clamp(least, 1), 1 - least)


def compared(found: Tensor, exact: Tensor, dtype: str) -> tuple[Verified, str]:
    """Largest difference and PSNR of finite images; the reason is empty where they agree."""
    largest = float((found.double().clamp(-1, 1) - exact.double().clamp(-1, 1)).abs().max())
    decibels = psnr(found, exact)
    if dtype == "fp32":
        passed, limit = largest <= MOST_DIFFERENCE, f"difference of at most {MOST_DIFFERENCE:g}"
        reason = f"its images differ from the eager float32 loop's by {largest:.2g}"
    else:
        passed = decibels >= LEAST_PSNR
        limit = f"PSNR of at least {LEAST_PSNR:g} dB"
        reason = f"its images are at {decibels:.1f} dB of the eager float32 loop's"
    finite = decibels if math.isfinite(decibels) else None
    verified = Verified(len(found), largest, finite, limit, passed)
    return verified, "" if passed else f"{reason}, accepted: {limit}; not timed"
