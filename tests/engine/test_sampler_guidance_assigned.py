"""What is assigned to a sampler after it was built: guidance is in force, the rest is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepfuse as sf

SCHEDULE = sf.Schedule.linear()
SHAPE = (2, 4, 8, 8)
# float32 products summed in another order, through the clipped steps of a loop
SAME_IMAGES = 1e-3


def _sampler(model: nn.Module, **options: Any) -> sf.Sampler:
    return sf.Sampler(model.eval(), SCHEDULE, steps=6, **options)


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
    captured = _sampler(Labelled(), guidance=sf.CFG(2.0, {"by": 0.0}))
    before = captured.sample(SHAPE, **GUIDED)
    captured.guidance = after
    fresh = _sampler(Labelled(), guidance=after)
    got = captured.sample(SHAPE, **GUIDED)
    assert torch.equal(got, fresh.sample(SHAPE, **GUIDED))
    assert captured.num_function_evaluations == fresh.num_function_evaluations
    assert captured.plan.guided == fresh.plan.guided
    assert captured.guidance is after
    if not getattr(after, "batched", False):
        assert not torch.equal(got, before)
    again = copy.copy(captured)
    assert torch.equal(again.sample(SHAPE, **GUIDED), got)


def test_a_guidance_that_cannot_be_meant_changes_nothing() -> None:
    captured = _sampler(Labelled(), guidance=sf.CFG(2.0, {"by": 0.0}))
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
    captured = _sampler(Labelled())
    value = getattr(captured, name)
    with pytest.raises(AttributeError, match=rf"Sampler\.{name} cannot be assigned: "):
        setattr(captured, name, value)
    with pytest.raises(AttributeError, match=rf"Sampler\.{name} cannot be deleted: "):
        delattr(captured, name)
    assert getattr(captured, name) is value
    public = {n for n in vars(captured) if not n.startswith("_")}
    assert public == set(sf.Sampler.FIXED)
