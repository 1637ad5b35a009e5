"""The terms of a batch of pairs (sample, timestep) on static buffers: what is captured once.

The terms of a bound do not depend on each other, so that any pairs fill a batch: samples and
timesteps are read from buffers, and one captured step serves all of them.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.replay.capture import untouched
from stepfuse.engine.sampling.bound.chain import Chain, Entry, mean_per_sample
from stepfuse.engine.sampling.bound.gaussians import (
    Cdf,
    discretised_log_likelihood,
    normal_divergence,
)
from stepfuse.engine.sampling.condition import Staged
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.uncapturable import refusal
from stepfuse.kernels.add_noise import add_noise


@dataclass(frozen=True)
class Pairs:
    """A batch: row ``rows[i]`` of the chain for sample i; every tensor has one entry for each."""

    rows: Tensor
    x0: Tensor
    seeds: Tensor
    samples: Tensor
    condition: dict[str, Any]
    noise: Tensor | None


class BoundProgram:
    """Static buffers for so many pairs, and one step over them.

    Args:
        chain: whose terms are taken.
        abar: of the schedule, float64 [T].
        pairs: an example, whose shapes and structure all others have.
        cdf: of the decoder.
        backend: of `add_noise`.

    After a step ``bits`` [B] has the term of every pair in bits/dim and ``x0_mse`` [B] the mean of
    (x0 - x0_hat)^2, in float64, and ``x0_hat`` [B, C, ...] the predicted image.
    """

    guidance = None

    def __init__(
        self, denoiser: Denoiser, chain: Chain, abar: Tensor, pairs: Pairs, cdf: Cdf, backend: str
    ) -> None:
        self.denoiser, self.learned, self._cdf, self._backend = (
            denoiser,
            chain.learned,
            cdf,
            backend,
        )
        self.staged = Staged(pairs.condition)
        self.device = pairs.x0.device
        count = len(pairs.rows)
        with torch.inference_mode(False):  # buffers can be written to outside of it, too
            self.x0 = torch.zeros_like(pairs.x0, memory_format=torch.contiguous_format)
            self.x_t, self.x0_hat = torch.zeros_like(self.x0), torch.zeros_like(self.x0)
            self.noise = None if pairs.noise is None else torch.zeros_like(self.x0)
            self.rows = torch.zeros(count, dtype=torch.int64, device=self.device)
            self.t, self.seeds = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
            self.samples = torch.zeros_like(self.rows)
            self.bits = torch.zeros(count, dtype=torch.float64, device=self.device)
            self.x0_mse = torch.zeros_like(self.bits)
            self._table = chain.table.to(self.device)
            self._timesteps = torch.tensor(chain.timesteps, device=self.device)
            self._abar = abar.to(self.device)

    def load(self, pairs: Pairs) -> None:
        """Copy a batch into the buffers."""
        for buffer, value in (
            (self.rows, pairs.rows),
            (self.x0, pairs.x0),
            (self.seeds, pairs.seeds),
            (self.samples, pairs.samples),
            (self.noise, pairs.noise),
        ):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        self.staged.load(pairs.condition)

    def advance(self, guided: bool) -> None:
        """Noise, denoise, and reduce to the terms, which ``guided`` does not change."""
        torch.index_select(self._timesteps, 0, self.rows, out=self.t)
        add_noise(
            self.x0,
            self.noise,
            self.t,
            self._abar,
            seed=None if self.noise is not None else self.seeds,
            sample=self.samples,
            out=self.x_t,
            backend=self._backend,
        )
        output = self.denoiser(self.x_t, self.t, self.staged.condition)
        self._reduce(*self._halves(output))

    def state(self) -> tuple[Tensor, ...]:
        """The buffers a step changes."""
        return (self.t, self.x_t, self.x0_hat, self.bits, self.x0_mse)

    def outputs(self) -> tuple[Tensor, ...]:
        """What the step is done for."""
        return (self.bits, self.x0_mse, self.x0_hat)

    def to_other_step(self, repeat: int) -> None:
        """Give every pair the row that mirrors its own."""
        self.rows.neg_().add_(len(self._table) - 1)

    @property
    def uncapturable(self) -> str:
        """Why the model must not be in a captured step; empty where it may."""
        return refusal(self.denoiser.model)

    def kept(self) -> AbstractContextManager[None]:
        """Do steps inside and be where it was before on leaving."""
        return untouched((*self.state(), self.rows))

    def _halves(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, where it is learned, the variance."""
        channels = self.x0.shape[1]
        wide = (len(self.x0), 2 * channels, *self.x0.shape[2:])
        accepted = [wide] if self.learned else [tuple(self.x0.shape), wide]
        if tuple(output.shape) not in accepted:
            kind = "a learned variance" if self.learned else "a fixed variance"
            raise ValueError(
                f"the model must give {' or '.join(map(str, accepted))} with {kind}; got shape "
                f"{tuple(output.shape)}"
            )
        w = output[:, channels:].double() if self.learned else None
        return output[:, :channels], w

    def _reduce(self, output: Tensor, w: Tensor | None) -> None:
        # in float64: the network's arithmetic is what a step costs, and float32 would cost digits
        rows = self._table.index_select(0, self.rows)
        axes = [1] * (self.x0.dim() - 1)

        def entry(which: Entry) -> Tensor:
            return rows[:, which].view(-1, *axes)

        x0 = self.x0.double()
        clip = entry(Entry.CLIP)
        guess = entry(Entry.P_X) * self.x_t.double() + entry(Entry.P_O) * output.double()
        guess = torch.minimum(torch.maximum(guess, -clip), clip)
        self.x0_hat.copy_(guess)
        x0_mse = mean_per_sample((x0 - guess).square())
        log_variance = entry(Entry.L_0)
        if w is None:
            nats = rows[:, Entry.CONSTANT] + rows[:, Entry.WEIGHT] * x0_mse
        else:
            log_variance = log_variance + entry(Entry.L_1) * w
            mean = entry(Entry.MEAN)
            nats = mean_per_sample(
                normal_divergence(mean * x0, entry(Entry.LOG_TRUE), mean * guess, log_variance)
            )
        mass = discretised_log_likelihood(x0, guess, (0.5 * log_variance).exp(), self._cdf)
        nats = torch.where(rows[:, Entry.LAST] > 0, -mean_per_sample(mass), nats)
        self.bits.copy_(nats / math.log(2))
        self.x0_mse.copy_(x0_mse)
