"""Loops of a scheduler around a stand-in network, ours and diffusers' side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from tests.engine.adapters.schedulers_case import ODD, seeded
from torch import Tensor

from stepfuse.engine.adapters import diffusers as ours_of

# float32, relative L2 after a whole loop. Rows are exact to rounding; what diffusers loses itself,
# in coefficients that are float32 differences of logarithms and in x + (x0 - x), is counted apart.
NEAR = 2e-6
SINGLE, DOUBLE = torch.float32, torch.float64


MEMORIES = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
NOISY = ["EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler"]  # in the dtype of x
NAMES = [
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    *MEMORIES,
    *NOISY,
]


def draws(name: str) -> bool:
    """Whether its ``step`` takes a generator."""
    return name not in ("UniPCMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler")


class Loop(NamedTuple):
    """The last x, what every step gave beside x_s, and the generator afterwards."""

    x: Tensor
    beside: list[Tensor]
    state: Tensor


def pair(name: str, strict: bool = True, **config: Any) -> tuple[Any, Any]:
    """(theirs, ours) of one configuration."""
    config = {**({"skip_prk_steps": True} if name == "PNDMScheduler" else {}), **config}
    theirs = getattr(diffusers, name)(**config)
    return theirs, getattr(ours_of, name).from_config(theirs.config, strict=strict)


def network(x: Tensor) -> Tensor:
    """Not linear in x, and of its size at most."""
    return torch.tanh(x * 0.7 + 0.1) * (0.5 + 0.3 * torch.sin(x))


def asked(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """The network's output at x, scaled where the scheduler scales."""
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    return network(scaled(x, t))


def start(scheduler: Any, shape: tuple[int, ...] = ODD) -> Tensor:
    """x at the first timestep."""
    noise = torch.randn(shape, generator=seeded(1), dtype=SINGLE)
    return noise * getattr(scheduler, "init_noise_sigma", 1.0)


def run(
    scheduler: Any,
    steps: int,
    *,
    dtype: torch.dtype = torch.float32,
    begin: int | None = None,
    shape: tuple[int, ...] = ODD,
    edit: Callable[[int, Tensor], Tensor] | None = None,
    set_timesteps: bool = True,
    generator: bool = True,
    **kwargs: Any,
) -> Loop:
    """A loop of so many steps, from step ``begin`` on; ``edit`` changes x between two of them."""
    if set_timesteps:
        scheduler.set_timesteps(steps)
    timesteps, drawn = scheduler.timesteps, seeded(3)
    if begin is not None:
        scheduler.set_begin_index(begin)
        timesteps = timesteps[begin:]
    if generator:
        kwargs["generator"] = drawn
    x, beside = start(scheduler, shape).to(dtype), []
    for i, t in enumerate(timesteps):
        output = asked(scheduler, x, t)
        x, *others = scheduler.step(output, t, x, return_dict=False, **kwargs)
        beside += others
        if edit is not None:
            x = edit(i, x)
    return Loop(x, beside, drawn.get_state())


def rows_of(scheduler: Any) -> int:
    """How many tables of rows a scheduler has made: 0 where the original did every step."""
    return sum(table is not None for table in vars(scheduler)["_tables"].values())


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative L2; infinite where one is no number and the other is."""
    assert found.shape == expected.shape
    assert found.dtype is expected.dtype
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    a, b = (v.double()[v.isfinite()] for v in (found, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if len(a) else 0.0


def exact(theirs: Any, steps: int, **options: Any) -> Loop:
    """The loop of diffusers' own code in float64, from its float32 sigmas and draws."""

    def drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        return randn_tensor(shape, generator, device, SINGLE).double()

    theirs.set_timesteps(steps)
    for table in {"sigmas", "alphas_cumprod"} & vars(theirs).keys():
        setattr(theirs, table, getattr(theirs, table).double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{type(theirs).__module__}.randn_tensor", drawn, raising=False)
        patch.setattr(torch, "float32", DOUBLE)
        return run(theirs, steps, dtype=DOUBLE, set_timesteps=False, **options)


def assert_same(ours: Loop, theirs: Loop, exact: Loop, near: float = NEAR) -> None:
    """The same draws; x, and what came beside it, as near to float64 as diffusers' or ``near``."""
    assert torch.equal(ours.state, theirs.state)
    every = [(loop.x, *loop.beside) for loop in (ours, theirs, exact)]
    for found, expected, best in zip(*every, strict=True):
        assert found.dtype is expected.dtype
        lost = difference(expected.double(), best)
        assert difference(found, expected) < near + lost
        assert difference(found.double(), best) < near + lost
