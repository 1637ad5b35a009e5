"""What diffusers' schedulers refuse, ours refuse with an error of the same type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tests.engine.adapters.schedulers_case import OURS


def _started(scheduler: Any, steps: int = 10) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


X = torch.randn(1, 3, 4, 4)
WIDE = torch.randn(1, 6, 4, 4)
MISTAKES: dict[str, tuple[str, Callable[[Any], Any], type[Exception]]] = {
    "too many steps": ("DDIMScheduler", lambda c: c().set_timesteps(1001), ValueError),
    "too many steps up": ("DDIMInverseScheduler", lambda c: c().set_timesteps(1001), ValueError),
    "no set_timesteps": ("DDIMScheduler", lambda c: c().step(X, 1, X), ValueError),
    "no set_timesteps up": ("DDIMInverseScheduler", lambda c: c().step(X, 1, X), TypeError),
    "spacing": ("DDIMScheduler", lambda c: _started(c(timestep_spacing="odd")), ValueError),
    "linspace up": (
        "DDIMInverseScheduler",
        lambda c: _started(c(timestep_spacing="linspace")),
        ValueError,
    ),
    "beta_schedule": ("DDIMScheduler", lambda c: c(beta_schedule="odd"), NotImplementedError),
    "sigmoid": ("DDIMScheduler", lambda c: c(beta_schedule="sigmoid"), NotImplementedError),
    "prediction_type": (
        "DDIMScheduler",
        lambda c: _started(c(prediction_type="odd")).step(X, 1, X),
        ValueError,
    ),
    "timestep": ("DDIMScheduler", lambda c: _started(c()).step(X, 1000, X), IndexError),
    "index 1000 of steps_offset": (
        "DDIMScheduler",
        lambda c: (s := _started(c(steps_offset=1), 1000)).step(X, s.timesteps[0], X),
        IndexError,
    ),
    "noise twice": (
        "DDIMScheduler",
        lambda c: _started(c()).step(X, 1, X, eta=1, generator=torch.Generator(), variance_noise=X),
        ValueError,
    ),
    "shapes": ("DDIMScheduler", lambda c: _started(c()).step(WIDE, 1, X), RuntimeError),
    "ascending": ("DDPMScheduler", lambda c: c().set_timesteps(timesteps=[1, 5]), ValueError),
    "repeated": ("DDPMScheduler", lambda c: c().set_timesteps(timesteps=[5, 5]), ValueError),
    "too late": ("DDPMScheduler", lambda c: c().set_timesteps(timesteps=[1000, 5]), ValueError),
    "both": ("DDPMScheduler", lambda c: c().set_timesteps(3, timesteps=[5, 1]), ValueError),
    "neither": ("DDPMScheduler", lambda c: c().set_timesteps(), TypeError),
    "not in the list": ("DDPMScheduler", lambda c: _started(c()).step(X, 1, X), IndexError),
    "no learned variance": (
        "DDPMScheduler",
        lambda c: _started(c(variance_type="learned_range")).step(X, 900, X),
        TypeError,
    ),
    "variance not asked for": (
        "DDPMScheduler",
        lambda c: _started(c()).step(WIDE, 900, X),
        RuntimeError,
    ),
    "unknown option": ("DDIMScheduler", lambda c: c(odd=1), TypeError),
    "noise index": (
        "DDIMScheduler",
        lambda c: c().add_noise(X, X, torch.tensor([1000])),
        IndexError,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_the_same_type(mistake: str) -> None:
    name, make, error = MISTAKES[mistake]
    for cls in (getattr(diffusers, name), OURS[name]):
        with pytest.raises(error):
            make(cls)


def test_no_steps_are_refused() -> None:
    for name in OURS:
        with pytest.raises(ValueError, match="at least 1; got 0"):
            OURS[name]().set_timesteps(0)
