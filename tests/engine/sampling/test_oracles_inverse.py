"""PiGDM and DPS against azula's, whose schedule counts from 1 and whose eta is ours squared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import azula.denoise
import azula.guidance.dps
import azula.guidance.pgdm
import azula.noise
import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor

from stepfuse import DPS, PiGDM, Sampler, Schedule, inverse

LINEAR = Schedule.linear()
STEPS = 10
TRAILING = list(range(999, 0, -100))
EXACT = 1e-9  # float64, amplified by 1 / sqrt(abar_T) = 158
OPERATORS: dict[str, Any] = {
    "blur": inverse.Blur(0.6),
    "downsample": inverse.Downsample(2),
    "mask": inverse.Mask(torch.eye(4)),
    "radon": inverse.Radon(2),
}


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


def walk(walker: Any, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Their samples from noise[0] as x_T and noise[1:] in the steps."""
    drawn: Iterator[Tensor] = iter(noise[1:])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda *_, **__: next(drawn))
        found: Tensor = walker(noise[0])
    return found


def ours(guidance: Any, noise: Tensor, y: Tensor, **settings: Any) -> Tensor:
    sampler = Sampler(
        Bumpy(), LINEAR, timesteps=TRAILING, prediction_type="sample", clip_sample=None,
        dtype=torch.float64, guidance=guidance, **settings,
    )  # fmt: skip
    return sampler.sample(noise.shape[1:], x_T=noise[0], noise=noise[1:], measurement=y)


def drawn(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(count)
    noise = torch.randn(STEPS + 1, count, 1, 4, 4, generator=draw, dtype=torch.float64)
    return noise, torch.randn(count, 1, 4, 4, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_pigdm_with_the_weight_of_the_paper(
    name: str, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs leaves out r2 against H H^T: r2 A^T (r2 A A^T)^-1 = A+, without noise."""
    a = OPERATORS[name]
    noise, x = drawn(2)
    y = a(x)
    theirs = azula.guidance.pgdm.PGDMSampler(
        Predicts(), y=y, A=a, A_inv=a.pinv, eta=eta**2,
        start=1000, stop=0, steps=STEPS, silent=True, dtype=torch.float64,
    )  # fmt: skip
    expected = walk(theirs, noise, monkeypatch)
    found = ours(PiGDM(a, weight="paper"), noise, y, eta=eta)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("zeta", [0.3, 2.0])
def test_dps(name: str, zeta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample by sample, since theirs takes one norm over the batch."""
    a = OPERATORS[name]
    noise, x = drawn(2)
    y = a(x)
    found = ours(DPS(a, zeta), noise, y, method="ddpm")
    for n in range(2):
        one = slice(n, n + 1)
        theirs = azula.guidance.dps.DPSSampler(
            Predicts(), y=y[one], A=a, zeta=zeta,
            start=1000, stop=0, steps=STEPS, silent=True, dtype=torch.float64,
        )  # fmt: skip
        expected = walk(theirs, noise[:, one], monkeypatch)
        torch.testing.assert_close(found[one], expected, rtol=EXACT, atol=EXACT)
