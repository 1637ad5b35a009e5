"""PiGDM and DPS against azula's, whose schedule counts from 1 and whose eta is ours squared."""

from __future__ import annotations

from typing import Any

import azula.guidance.dps
import azula.guidance.pgdm
import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from tests.engine.sampling.azula_case import LINEAR, STEPS, TRAILING, Predicts, walk
from torch import Tensor

from stepfuse import DPS, PiGDM, Sampler, inverse

EXACT = 1e-9  # float64, amplified by 1 / sqrt(abar_T) = 158
OPERATORS: dict[str, Any] = {
    "blur": inverse.Blur(0.6),
    "downsample": inverse.Downsample(2),
    "mask": inverse.Mask(torch.eye(4)),
    "radon": inverse.Radon(2),
}


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
    sampler, settings = azula.guidance.pgdm.PGDMSampler, {"y": y, "A": a, "A_inv": a.pinv}
    expected = walk(sampler, Predicts(), noise, monkeypatch, eta=eta**2, **settings)
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
        sampler, settings = azula.guidance.dps.DPSSampler, {"y": y[one], "A": a, "zeta": zeta}
        expected = walk(sampler, Predicts(), noise[:, one], monkeypatch, **settings)
        torch.testing.assert_close(found[one], expected, rtol=EXACT, atol=EXACT)
