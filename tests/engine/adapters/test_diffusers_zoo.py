"""Every kind of pipeline gives what it gave before, by compiled networks; and is restored."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.engine.adapters.diffusers_models import SAME, counted, psnr
from tests.engine.adapters.diffusers_zoo import ZOO, build, call
from torch import Tensor, nn

from stepfuse.engine.adapters.diffusers import accelerate, explain, restore
from stepfuse.engine.adapters.diffusers.denoiser import forward_of, is_denoiser
from stepfuse.engine.compile.network import CompiledNetwork

FLOWS = ("StableDiffusion3", "Flux")  # whose scheduler is none of ours
DENOISERS = {"ControlNet": 2, "MultiControlNet": 2}


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in vars(pipe).items() if is_denoiser(part)}


def state(pipe: Any) -> tuple[Any, ...]:
    """The parts of a pipeline, what hangs on them, and copies of all weights."""
    parts = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    return (
        dict(vars(pipe)),
        {name: dict(vars(part)) for name, part in parts.items()},
        {name: list(part.modules()) for name, part in parts.items()},
        {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()},
        dict(pipe.config),
    )


def assert_same_state(now: tuple[Any, ...], then: tuple[Any, ...]) -> None:
    assert now[0].keys() == then[0].keys()
    for key, value in then[0].items():
        assert now[0][key] is value or (not isinstance(value, nn.Module) and now[0][key] == value)
    for name, held in then[1].items():
        assert now[1][name].keys() == held.keys(), name
    assert now[2] == then[2]
    for name, weights in then[3].items():
        assert now[3][name].keys() == weights.keys()
        assert all(torch.equal(now[3][name][key], weights[key]) for key in weights), name
    assert now[4] == then[4]


def near(found: Tensor, expected: Tensor) -> float:
    """dB, the largest number for the peak."""
    return psnr(found, expected, peak=float(expected.abs().max()))


@pytest.mark.parametrize("name", ZOO)
def test_results_stay_the_same(name: str) -> None:
    pipe = build(name)
    expected = call(pipe, name)
    assert float(expected.double().std()) > 0.005 * float(expected.abs().max()) > 0
    before = state(pipe)
    parts = denoisers(pipe)
    assert len(parts) == DENOISERS.get(name, 1)
    assert accelerate(pipe) is pipe
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "stepfuse")
        assert near(call(pipe, name), expected) > SAME
        for part in parts.values():
            assert counted(part, lambda: call(pipe, name)) == 0
    for part in parts.values():
        forward = forward_of(part)
        assert forward is not None
        assert not forward.originals
        assert all(isinstance(n, CompiledNetwork) for n in forward._fast.networks)
        assert len(forward._fast.networks) == 1
    said = explain(pipe)
    assert all(type(part).__name__ in said for part in parts.values())
    assert ("left alone: FlowMatch" if name in FLOWS else "by denoise_step") in said
    assert restore(pipe) is pipe
    assert_same_state(state(pipe), before)
    assert torch.equal(call(pipe, name), expected)
