"""Whole trajectories against azula, whose samplers walk any signal and noise scales.

Its eta scales the variance of the noise, the DDIM paper's its standard deviation: azula's is the
square of ours.
"""

from __future__ import annotations

import azula.denoise
import azula.sample
import pytest
import torch
from azula.linalg.covariance import IsotropicCovariance
from tests.engine.sampling.analytic import Bumpy, Gaussian
from tests.engine.sampling.azula_case import LINEAR, STEPS, TRAILING, Discrete, Predicts, walk
from torch import Tensor

from stepfuse import Sampler

SHAPE = (2, 3, 4)
EXACT = 1e-9  # float64, amplified by 1 / sqrt(abar_T) = 158


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
