"""`Sampler(optimize=...)`: the same images, captured, through new tables and changed weights."""

from __future__ import annotations

import pytest
import torch

import stepfuse as sf
from stepfuse.engine.compile.optimize import WeightsChanged

SHAPE = (2, 1, 32, 32)
LABELS = {"labels": torch.tensor([3, 7])}
# float32 products summed in another order, through the clipped steps of a loop
SAME_IMAGES = 1e-3


def pair(**settings: object) -> tuple[sf.Sampler, sf.Sampler]:
    digits = sf.load("digits")
    plain = sf.Sampler(digits.model, digits.schedule, **settings)
    return plain, sf.Sampler(digits.model, digits.schedule, optimize=True, **settings)


def assert_same(plain: sf.Sampler, fast: sf.Sampler) -> torch.Tensor:
    expected, got = plain.sample(SHAPE, condition=LABELS), fast.sample(SHAPE, condition=LABELS)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_IMAGES)
    return got


def test_images_are_the_same_and_the_step_is_captured() -> None:
    plain, fast = pair(steps=5)
    assert_same(plain, fast)
    assert fast.stats()["eager_steps"] == 0, fast.explain()


def test_guidance_encoding_and_new_tables() -> None:
    plain, fast = pair(steps=4, guidance=sf.CFG(2.0, {"labels": None}))
    image = assert_same(plain, fast)
    torch.testing.assert_close(
        fast.encode(image, LABELS), plain.encode(image, LABELS), rtol=0, atol=SAME_IMAGES
    )
    for sampler in (plain, fast):
        sampler.set_timesteps(3, "trailing", eta=0.5)
    assert_same(plain, fast)


def test_bfloat16_is_close() -> None:
    digits = sf.load("digits")
    plain = sf.Sampler(digits.model, digits.schedule, steps=10)
    fast = sf.Sampler(digits.model, digits.schedule, steps=10, optimize=torch.bfloat16)
    expected, got = plain.sample(SHAPE, condition=LABELS), fast.sample(SHAPE, condition=LABELS)
    assert got.dtype == torch.float32
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < 0.1, "8 bits of mantissa, through 10 steps"


def test_changed_weights_raise_until_refreshed() -> None:
    plain, fast = pair(steps=3)
    before = assert_same(plain, fast)
    with torch.no_grad():
        for weight in plain.denoiser.parameters():
            if weight.is_floating_point():
                weight.mul_(1.05)
    with pytest.raises(WeightsChanged, match="refresh"):
        fast.sample(SHAPE, condition=LABELS)
    fast.refresh()
    plain_fast = sf.Sampler(fast.denoiser.model.original, plain.schedule, steps=3)
    assert not torch.equal(assert_same(plain_fast, fast), before)


def test_a_plain_function_cannot_be_optimised() -> None:
    with pytest.raises(TypeError, match=r"model for optimize must be an nn\.Module; got"):
        sf.Sampler(lambda x, t: x, sf.Schedule.linear(), optimize=True)
