"""Guidance of a user's own: checked where it is given, run in the captured step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.replay.capture import CaptureRefused
from stepfuse.engine.sampling.evaluation import Evaluation
from stepfuse.engine.sampling.lint import check_capturable
from stepfuse.kernels.step_row import Column

SCHEDULE = sf.Schedule.linear()
SHAPE = (2, 3, 4, 5)


class Twice:
    """Two evaluations, averaged: nothing but what is required."""

    evaluations = 2

    def outputs(self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        return (denoiser(x, t, condition) + denoiser(x * 0.9, t, condition)) / 2


class Mixed:
    """What CFG does, by the protocol alone."""

    evaluations = 2
    mixture = True

    def __init__(self, scale: float, unconditional: Mapping[str, Any]) -> None:
        self.scale, self.unconditional = scale, unconditional

    def scale_at(self, t: int) -> float:
        return self.scale if t > 300 else 1.0

    def is_active(self, t: int) -> bool:
        return self.scale_at(t) != 1

    def outputs(self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
        unguided = denoiser(x, t, denoiser.unconditional)
        return sf.Outputs(denoiser(x, t, condition), unguided)


class Pulled:
    """A shift of x after the update, as strong as the step's noise."""

    evaluations = 1

    def __init__(self, target: float) -> None:
        self.target = target

    def outputs(self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
        pull = denoiser.row[Column.NOISE] * (self.target - x)
        return sf.Outputs(denoiser(x, t, condition), shift=0.1 * pull)


def shifted(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    return torch.sin(x + shift.view(-1, 1, 1, 1)) * (0.5 + t.view(-1, 1, 1, 1) / 1000)


def sampler(guidance: Any, model: Any = None, **settings: Any) -> sf.Sampler:
    return sf.Sampler(model or Bumpy(), SCHEDULE, guidance=guidance, **{"steps": 6, **settings})


def test_two_members_are_enough() -> None:
    guided = sampler(Twice())
    assert guided.num_function_evaluations == 12
    found = guided.sample(SHAPE, seed=1)
    model = Bumpy()
    twice = sf.Sampler(lambda x, t: (model(x, t) + model(x * 0.9, t)) / 2, SCHEDULE, steps=6)
    assert torch.equal(found, twice.sample(SHAPE, seed=1))
    assert guided.stats()["replays"] == 6
    assert not torch.equal(found, sampler(None).sample(SHAPE, seed=1))


@pytest.mark.parametrize("graph", [None, "auto"])
def test_one_that_mixes_is_cfg(graph: Any) -> None:
    nothing = {"shift": torch.zeros(2)}
    condition = {"shift": torch.tensor([0.4, -0.3])}
    cfg = sf.CFG(2.5, unconditional=nothing, interval=(301, 1000))
    found = []
    for guidance in (cfg, Mixed(2.5, nothing)):
        guided = sampler(guidance, shifted, graph=graph)
        assert guided.num_function_evaluations == 10  # timesteps 830, 664, 498 and 332 of six
        found.append(guided.sample(SHAPE, seed=2, condition=condition))
    assert torch.equal(*found)


def test_a_shift_is_added_after_the_update() -> None:
    guided, plain = sampler(Pulled(0.5), steps=1), sampler(None, steps=1)
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    noise = float(plain.plan.table[0, Column.NOISE])
    expected = plain.sample(SHAPE, x_T=x_T) + 0.1 * (noise * (0.5 - x_T))
    torch.testing.assert_close(guided.sample(SHAPE, x_T=x_T), expected)


def test_what_it_decides_from_is_looked_at() -> None:
    guidance = Pulled(0.5)
    guided = sampler(guidance)
    first = guided.sample(SHAPE, seed=1)
    guidance.target = -0.5
    changed = guided.sample(SHAPE, seed=1)
    assert torch.equal(changed, sampler(Pulled(-0.5)).sample(SHAPE, seed=1))
    assert not torch.equal(first, changed)


class Deciding:
    """Reads a number on the host, which no captured step may."""

    evaluations = 1
    capturable = False

    def outputs(self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        output = denoiser(x, t, condition)
        return output * 0.5 if float(x.mean()) > 0 else output


def test_one_that_cannot_be_captured_runs_eagerly() -> None:
    guided = sampler(Deciding())
    guided.sample(SHAPE, seed=1)
    stats = guided.stats()
    assert (stats["eager_steps"], stats["captures"]) == (6, 0)
    assert "the guidance asks for it (capturable=False)" in guided.explain()


@pytest.mark.parametrize("again", [copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_keep_it(again: Any) -> None:
    guided = sampler(Pulled(0.2))
    assert torch.equal(again(guided).sample(SHAPE, seed=4), guided.sample(SHAPE, seed=4))


def test_it_can_be_assigned() -> None:
    plain = sampler(None)
    plain.guidance = Twice()
    assert plain.num_function_evaluations == 12
    assert torch.equal(plain.sample(SHAPE, seed=1), sampler(Twice()).sample(SHAPE, seed=1))
    with pytest.raises(TypeError, match="has no outputs and no evaluations"):
        plain.guidance = object()
    assert isinstance(plain.guidance, Twice)


def test_the_lint_runs_it() -> None:
    check_capturable(sampler(Pulled(0.1)), SHAPE)
    with pytest.raises(CaptureRefused) as caught:
        check_capturable(sampler(Deciding()), SHAPE)
    assert "read on the host" in str(caught.value)


def with_members(**members: Any) -> Any:
    return type("Mine", (), {"evaluations": 1, "outputs": Twice.outputs, **members})()


class Ignored:
    """What was taken for a guidance once, and did nothing."""

    def scale_at(self, t: int) -> float:
        return 2.0

    def is_active(self, t: int) -> bool:
        return True


@pytest.mark.parametrize(
    ("guidance", "error", "message"),
    [
        (object(), TypeError, "got .*object.*, which has no outputs and no evaluations"),
        (Ignored(), TypeError, "which has no outputs and no evaluations"),
        (type("Half", (), {"outputs": Twice.outputs})(), TypeError, "which has no evaluations"),
        (Twice, TypeError, "Twice'>, the class"),
        (with_members(outputs=3), TypeError, "outputs of the guidance must be callable; got int 3"),
        (
            with_members(outputs=lambda self, x, t: x),
            TypeError,
            r"must take \(denoiser, x, t, condition\); got outputs\(x, t\)",
        ),
        (with_members(evaluations=0), ValueError, "evaluations of the guidance must be 1 or more"),
        (with_members(evaluations="2"), TypeError, "evaluations of the guidance"),
        (with_members(capturable="no"), TypeError, "capturable of the guidance"),
        (with_members(batched=3), TypeError, "batched of the guidance"),
        (with_members(scale_at=2.0), TypeError, "scale_at of the guidance must be callable"),
        (with_members(unconditional=[1]), TypeError, "unconditional of the guidance must be a map"),
    ],
)
def test_what_does_not_follow_it(guidance: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sampler(guidance)


@pytest.mark.parametrize("made", [None, 3.0, (torch.zeros(SHAPE),), sf.Outputs(None)])
def test_outputs_that_are_none(made: Any) -> None:
    guidance = with_members(outputs=lambda self, denoiser, x, t, condition: made)
    with pytest.raises(TypeError, match="outputs of the guidance must return a tensor or Outputs"):
        sampler(guidance, graph=None).sample(SHAPE)
