"""A model and a table of ours in azula's words, where time i + 1 is our index i."""

from __future__ import annotations

from collections.abc import Iterator

import azula.denoise
import azula.noise
import azula.sample
import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor

from stepfuse import Schedule

LINEAR = Schedule.linear()
STEPS = 10
TRAILING = list(range(999, 0, -100))  # time 1000, 900, .. 100, counted from 1, and 0 for x_0


class Discrete(azula.noise.Schedule):
    """Our table in their words: time 0 is x_0."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones(1, dtype=torch.float64)
        abar = torch.cat([one, LINEAR.alphas_cumprod])[t.long()]
        return abar.sqrt(), (1 - abar).sqrt()


class Predicts(azula.denoise.Denoiser):
    """A model of ours that predicts x0, in their words."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Discrete()

    def forward(self, x: Tensor, t: Tensor) -> azula.denoise.DiracPosterior:
        index = (t.long() - 1).expand(len(x))
        return azula.denoise.DiracPosterior(mean=Bumpy()(x, index))


def walk(
    sampler: type[azula.sample.Sampler],
    denoiser: azula.denoise.Denoiser,
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    **settings: object,
) -> Tensor:
    """Their samples from noise[0] as x_T and noise[1:] in the steps."""
    drawn: Iterator[Tensor] = iter(noise[1:])
    walker = sampler(
        denoiser, start=1000, stop=0, steps=STEPS, silent=True, dtype=torch.float64, **settings
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda *_, **__: next(drawn))
        return walker(noise[0])
