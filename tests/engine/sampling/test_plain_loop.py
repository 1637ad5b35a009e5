"""`Sampler` and its table against the loop that the papers describe, step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor

from stepfuse import CFG, Sampler, Schedule, spaced_timesteps
from stepfuse.engine.sampling.plain_loop import plain_loop
from stepfuse.kernels import philox

SCHEDULE = Schedule.linear()
SHAPE = (3, 2, 5, 3)
# float64 through ten steps of a nonlinear model, which amplify the rounding of each
FLOAT64 = 1e-9
FLOAT32 = 2e-4
SETTINGS: list[dict[str, Any]] = [
    {},
    {"eta": 0.7},
    {"eta": 1.0, "clip_sample": None},
    {"clip_sample": 0.5, "rederive_epsilon": False},
    {"method": "ddim_hat"},
    {"method": "ddpm"},
    {"method": "ddpm", "variance_type": "fixed_large"},
    {"method": "ddpm", "variance_type": "learned"},
    {"method": "ddpm", "variance_type": "learned_range", "variance_at_zero": "clamp"},
    {"method": "ddgan", "prediction_type": "sample"},
    {"prediction_type": "v_prediction", "final_alpha_one": False},
    {"prediction_type": "sample", "eta": 0.5},
    {"prediction_type": "mean", "method": "ddpm"},
]


def drawn(t: int) -> Tensor:
    return philox.normal(
        5, torch.arange(SHAPE[0]), t, SHAPE[1:], backend="reference", dtype=torch.float64
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_sampler_is_the_plain_loop(settings: dict[str, Any]) -> None:
    model = Bumpy(settings.get("variance_type", "fixed_small"))
    times = spaced_timesteps(1000, 10)
    x = drawn(philox.INITIAL)
    expected = plain_loop(model, SCHEDULE, times, x, drawn, **settings)
    assert float((expected - x).abs().max()) > 0.1
    sampler = Sampler(
        model, SCHEDULE, steps=10, backend="reference", dtype=torch.float64, graph=None, **settings
    )
    found = sampler.sample(SHAPE, seed=5, x_T=x)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_captured_float32_loop_is_near_it(settings: dict[str, Any]) -> None:
    model = Bumpy(settings.get("variance_type", "fixed_small"))
    times = spaced_timesteps(1000, 4)
    x = drawn(philox.INITIAL).float()
    expected = plain_loop(model, SCHEDULE, times, x.double(), drawn, **settings)
    sampler = Sampler(model, SCHEDULE, steps=4, **settings)
    noise = torch.stack([drawn(t) for t in times]).float()
    found = sampler.sample(SHAPE, x_T=x, noise=noise)
    assert sampler.stats()["replays"] == 4
    torch.testing.assert_close(found.double(), expected, rtol=FLOAT32, atol=FLOAT32)


def shifted(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    return torch.sin(x + shift[:, None, None, None]) + t[0] / 1000


def test_guidance_is_the_mixture_of_two_outputs() -> None:
    x, times = drawn(philox.INITIAL), spaced_timesteps(1000, 6)
    condition = {"shift": torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)}
    nothing = {"shift": torch.zeros(3, dtype=torch.float64)}
    expected = plain_loop(
        shifted, SCHEDULE, times, x, condition=condition, scale=2.5, unconditional=nothing
    )
    sampler = Sampler(
        shifted,
        SCHEDULE,
        steps=6,
        backend="reference",
        dtype=torch.float64,
        guidance=CFG(2.5, unconditional=nothing),
    )
    found = sampler.sample(SHAPE, x_T=x, condition=condition)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64)
    plain = plain_loop(shifted, SCHEDULE, times, x, condition=condition)
    assert float((plain - expected).abs().max()) > 0.01
