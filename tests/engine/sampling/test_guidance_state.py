"""A guidance that keeps numbers from step to step, in a tensor that it writes to in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import stepfuse as sf

SHAPE, STEPS = (2, 3, 4, 4), 6


class Counting:
    """Notes every step; what it gives does not depend on that."""

    evaluations = 1

    def __init__(self) -> None:
        self.count = torch.zeros(1)

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        output: Tensor = denoiser(x, t, condition)
        self.count.add_(1)
        return output


class Averaging(Counting):
    """Gives the running mean of all outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(SHAPE)

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        output = super().outputs(denoiser, x, t, condition)
        self.mean.add_((output - self.mean) / self.count)
        return self.mean.clone()


def drawn(guidance: Any, graph: Any) -> tuple[Tensor, sf.Sampler]:
    sampler = sf.Sampler(
        lambda x, t: torch.tanh(x),
        sf.Schedule.linear(),
        steps=STEPS,
        guidance=guidance,
        graph=graph,
    )
    return sampler.sample(SHAPE, seed=1), sampler


@pytest.mark.parametrize("kind", [Counting, Averaging])
def test_tries_of_a_capture_leave_nothing_behind(kind: Any) -> None:
    eager, captured = kind(), kind()
    expected, _ = drawn(eager, None)
    found, sampler = drawn(captured, "auto")
    assert torch.equal(found, expected)
    assert captured.count.item() == eager.count.item() == STEPS
    for name, value in vars(eager).items():
        assert torch.equal(getattr(captured, name), value), name
    stats = sampler.stats()
    assert stats["replays"] + stats["eager_steps"] == STEPS


def test_one_that_only_counts_is_captured() -> None:
    guidance = Counting()
    _, sampler = drawn(guidance, "auto")
    assert sampler.stats()["replays"] == STEPS
    sampler.sample(SHAPE, seed=2)
    assert guidance.count.item() == 2 * STEPS
