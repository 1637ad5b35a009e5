"""Whole trajectories against azula, whose samplers walk any signal and noise scales.

Its eta scales the variance of the noise, the DDIM paper's its standard deviation: azula's is the
square of ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import azula.denoise
import azula.noise
import azula.sample
import pytest
import torch
from azula.linalg.covariance import IsotropicCovariance
from tests.engine.sampling.analytic import Bumpy, Gaussian
from torch import Tensor

from stepfuse import Sampler, Schedule

LINEAR = Schedule.linear()
STEPS = 10
TRAILING = list(range(999, 0, -100))  # time 1000, 900, .. 100, counted from 1, and 0 for x_0
SHAPE = (2, 3, 4)
EXACT = 1e-9  # float64, amplified by 1 / sqrt(abar_T) = 158


class Discrete(azula.noise.Schedule):
    """Our table in their words: time i + 1 is our index i, time 0 is x_0."""

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
    **settings: float,
) -> Tensor:
    """Their samples from noise[0] as x_T and noise[1:] in the steps."""
    drawn: Iterator[Tensor] = iter(noise[1:])
    walker = sampler(
        denoiser, start=1000, stop=0, steps=STEPS, silent=True, dtype=torch.float64, **settings
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda *_, **__: next(drawn))
        return walker(noise[0])


def ours(noise: Tensor, model: object = None, **settings: object) -> Tensor:
    sampler = Sampler(
        model or Bumpy(),
        LINEAR,
        timesteps=TRAILING,
        prediction_type="sample",
        clip_sample=None,
        dtype=torch.float64,
        graph=None,
        **settings,
    )
    return sampler.sample(SHAPE, x_T=noise[0], noise=noise[1:])


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(STEPS + 1, *SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_ddim(eta: float, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = walk(azula.sample.DDIMSampler, Predicts(), noise, monkeypatch, eta=eta**2)
    torch.testing.assert_close(ours(noise, eta=eta), expected, rtol=EXACT, atol=EXACT)


def test_the_two_mean_different_things_by_eta(
    noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsquared = walk(azula.sample.DDIMSampler, Predicts(), noise, monkeypatch, eta=0.5)
    assert float((ours(noise, eta=0.5) - unsquared).abs().max()) > 0.01


def test_ddpm(noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = walk(azula.sample.DDPMSampler, Predicts(), noise, monkeypatch)
    torch.testing.assert_close(ours(noise, method="ddpm"), expected, rtol=EXACT, atol=EXACT)


def test_euler_is_the_deterministic_one(noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = walk(azula.sample.EulerSampler, Predicts(), noise, monkeypatch)
    torch.testing.assert_close(ours(noise), expected, rtol=EXACT, atol=EXACT)


def test_the_optimal_denoiser(noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """azula's closed form of the Gaussian posterior, and ours."""
    theirs = azula.denoise.GaussianDenoiser(
        torch.full(SHAPE[1:], 0.3, dtype=torch.float64), IsotropicCovariance(0.25), Discrete()
    )
    mine = Gaussian(LINEAR, "sample")
    for t in (0, 10, 500, 999):
        expected = theirs(noise[0], torch.tensor(t + 1)).mean
        torch.testing.assert_close(
            mine(noise[0], torch.full((2,), t)), expected, rtol=1e-10, atol=1e-10
        )
    expected = walk(azula.sample.DDIMSampler, theirs, noise, monkeypatch, eta=1.0)
    torch.testing.assert_close(ours(noise, mine, eta=1.0), expected, rtol=EXACT, atol=EXACT)
