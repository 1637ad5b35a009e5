"""How well `digits` restores: floors in PSNR, and what the samples of a posterior cover.

The images are the network's own, so that nothing has to be fetched: eight, classes taking turns,
restored without their class in 20 steps. Floors are what was measured, less 0.5 dB.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.cli.restoring import psnr

NOISE, COUNT, STEPS = 0.05, 8, 20


def box() -> sf.inverse.Mask:
    mask = torch.ones(32, 32)
    mask[9:23, 9:23] = 0
    return sf.inverse.Mask(mask)


TASKS: dict[str, Any] = {
    "box of 14x14": box(),
    "block mean of 4x4": sf.inverse.Downsample(4),
    "blur of 2": sf.inverse.Blur(2.0),
    "8 angles": sf.inverse.Radon(8, normalize=True),
}
ZETA = {"box of 14x14": 1.0, "block mean of 4x4": 1.0, "blur of 2": 1.0, "8 angles": 1.0}


@functools.cache
def truth() -> Tensor:
    digits = sf.load("digits")
    labels = {"labels": torch.arange(COUNT)}
    sampler = digits.sampler(steps=20)
    return sampler.sample((COUNT, *digits.sample_shape), seed=7, condition=labels).clamp(-1, 1)


@functools.cache
def measured(task: str) -> Tensor:
    y = TASKS[task](truth())
    return y + NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


def samples(task: str, guidance: Any, **settings: Any) -> Tensor:
    digits = sf.load("digits")
    sampler = digits.sampler(steps=STEPS, eta=1.0, guidance=guidance)
    null = {"labels": torch.full((COUNT,), digits.num_classes)}
    shape = (COUNT, *digits.sample_shape)
    x = sampler.sample(shape, measurement=measured(task), condition=null, **settings)
    assert sampler.stats()["eager_steps"] == 0
    return x.clamp(-1, 1)


def restored(task: str, method: str) -> tuple[float, float]:
    """PSNR of the pseudo-inverse and of one sample, dB, over the images."""
    a = TASKS[task]
    guidance = sf.PiGDM(a, NOISE, 0.6) if method == "pigdm" else sf.DPS(a, ZETA[task])
    pinv = a.pinv(measured(task)).clamp(-1, 1)
    found = samples(task, guidance)
    return float(psnr(pinv, truth()).mean()), float(psnr(found, truth()).mean())


# pseudo-inverse, PiGDM, as measured
FLOORS = {
    "box of 14x14": (14.13, 14.65),
    "block mean of 4x4": (15.78, 17.94),
    "blur of 2": (3.14, 22.55),
    "8 angles": (3.46, 24.46),
}


@pytest.mark.parametrize("task", TASKS)
def test_one_sample_is_better_than_the_pseudo_inverse(task: str) -> None:
    pinv, found = restored(task, "pigdm")
    assert pinv == pytest.approx(FLOORS[task][0], abs=0.5)
    assert found > FLOORS[task][1] - 0.5


def test_dps_comes_after_pigdm_at_few_steps() -> None:
    """It takes small steps from a random start: a blur is found, but less of it."""
    pinv, found = restored("blur of 2", "dps")
    assert pinv + 5 < 14.75 - 0.5 < found < FLOORS["blur of 2"][1]


def test_samples_of_a_posterior_keep_to_what_was_measured_and_differ_where_it_was_not() -> None:
    """Outside of the hole the error is that of the noise; inside samples differ by more."""
    a = TASKS["box of 14x14"]
    two = [samples("box of 14x14", sf.PiGDM(a, NOISE, 0.6), seed=n) for n in (1, 2)]
    known = a.mask.expand_as(two[0]) == 1
    outside = float((two[0] - truth())[known].square().mean().sqrt())
    assert outside < 2 * NOISE
    between = two[0] - two[1]
    assert float(between[~known].std()) > 4 * float(between[known].std())
