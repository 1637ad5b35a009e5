"""What can be assigned to a sampler is in force, and what would be ignored cannot be assigned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepfuse as sf

SHAPE = (2, 4, 8, 8)


def sampler(model: Any, **settings: Any) -> sf.Sampler:
    return sf.Sampler(model, sf.Schedule.linear(), graph="step", steps=4, **settings)


class Labelled(nn.Module):
    """Reads a condition."""

    def forward(self, x: Tensor, t: Tensor, by: Tensor) -> Tensor:
        return 0.1 * x * by[:, None, None, None]


GUIDED = {"condition": {"by": torch.tensor([1.0, 2.0])}}


@pytest.mark.parametrize(
    "after",
    [
        sf.CFG(5.0, {"by": 0.0}),
        sf.CFG(2.0, {"by": 0.0}, rescale=0.7, interval=(300, 600)),
        sf.CFG(2.0, {"by": 0.0}, batched=True),
        sf.ClassifierGuidance(lambda x, t, by: -x.square().sum((1, 2, 3)), 5.0),
        None,
    ],
)
def test_an_assigned_guidance_is_in_force(after: Any) -> None:
    captured = sampler(Labelled(), guidance=sf.CFG(2.0, {"by": 0.0}))
    before = captured.sample(SHAPE, **GUIDED)
    captured.guidance = after
    fresh = sampler(Labelled(), guidance=after)
    got = captured.sample(SHAPE, **GUIDED)
    assert torch.equal(got, fresh.sample(SHAPE, **GUIDED))
    assert captured.num_function_evaluations == fresh.num_function_evaluations
    assert captured.plan.guided == fresh.plan.guided
    assert captured.guidance is after
    if getattr(after, "batched", False) is not True:
        assert not torch.equal(got, before)
    again = copy.copy(captured)
    assert torch.equal(again.sample(SHAPE, **GUIDED), got)


def test_a_guidance_that_cannot_be_meant_changes_nothing() -> None:
    captured = sampler(Labelled(), guidance=sf.CFG(2.0, {"by": 0.0}))
    before = captured.sample(SHAPE, **GUIDED)
    with pytest.raises(TypeError, match=r"guidance must be a CFG, .* or None; got int 5"):
        captured.guidance = 5  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="busy"):
        captured.sample(
            SHAPE, **GUIDED, callback=lambda _: setattr(captured, "guidance", sf.CFG(5.0))
        )
    assert torch.equal(captured.sample(SHAPE, **GUIDED), before)


@pytest.mark.parametrize("name", sorted(sf.Sampler.FIXED))
def test_a_setting_that_would_be_ignored_cannot_be_assigned(name: str) -> None:
    captured = sampler(Labelled())
    value = getattr(captured, name)
    with pytest.raises(AttributeError, match=rf"Sampler\.{name} cannot be assigned: "):
        setattr(captured, name, value)
    with pytest.raises(AttributeError, match=rf"Sampler\.{name} cannot be deleted: "):
        delattr(captured, name)
    assert getattr(captured, name) is value
    public = {n for n in vars(captured) if not n.startswith("_")}
    assert public == set(sf.Sampler.FIXED)


class Convolved(nn.Module):
    """Has an operator that autocast runs in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_captured_under_autocast_is_not_replayed_outside(dtype: torch.dtype) -> None:
    model = Convolved().eval()
    captured, eager = sampler(model), sf.Sampler(model, sf.Schedule.linear(), graph=None, steps=4)
    images = []
    for inside in (True, False, True):
        with torch.autocast("cpu", dtype, enabled=inside):
            images.append(captured.sample(SHAPE))
            assert torch.equal(images[-1], eager.sample(SHAPE))
    assert not torch.equal(images[0], images[1])
    with torch.autocast("cpu", torch.bfloat16 if dtype is torch.float16 else torch.float16):
        assert torch.equal(captured.sample(SHAPE), eager.sample(SHAPE))
    assert captured.stats()["eager_steps"] == 0, captured.explain()


def test_weights_that_autocast_has_cast_are_cast_again_by_a_replay() -> None:
    model = Convolved().eval()
    captured, eager = sampler(model), sf.Sampler(model, sf.Schedule.linear(), graph=None, steps=4)
    with torch.autocast("cpu", torch.bfloat16):
        eager.sample(SHAPE)  # keeps a copy of the weight until the block is left
        before = captured.sample(SHAPE)
    with torch.no_grad():
        model.conv.weight.mul_(-1)
    with torch.autocast("cpu", torch.bfloat16):
        after = captured.sample(SHAPE)
        assert torch.equal(after, eager.sample(SHAPE))
    assert not torch.equal(after, before)
    assert captured.stats()["captures"] == 1
