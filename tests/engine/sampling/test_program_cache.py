"""The cache of programs: bounded, counted, and without growth from step to step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stepfuse as sf

SCHEDULE = sf.Schedule.linear()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))


class Untimed(nn.Module):
    """An image model that ignores the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x)


def net_bytes(sampler: sf.Sampler, steps: int) -> int:
    """Bytes allocated and not freed by PyTorch's CPU allocator over ``steps`` steps."""
    (part,) = sampler._request((2, 1, 16, 16)).parts(None)
    runner = sampler._load(part, sampler.plan)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(steps):
            runner.run_step(False)
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("graph", [None, "step"])
def test_no_net_allocation_from_step_to_step(graph: str | None) -> None:
    sampler = sf.Sampler(Untimed(), SCHEDULE, steps=60, graph=graph, eta=0.5)
    sampler.sample((2, 1, 16, 16))
    assert net_bytes(sampler, 1) == 0
    assert net_bytes(sampler, 40) == 0


def test_the_accounting_sees_a_leak() -> None:
    kept = []

    def leaking(x: Tensor, t: Tensor) -> Tensor:
        kept.append(x * 2)
        return x

    sampler = sf.Sampler(leaking, SCHEDULE, steps=60, graph=None)
    assert net_bytes(sampler, 10) >= 10 * 2 * 16 * 16 * 4


def test_the_cache_is_bounded_and_counts() -> None:
    sampler = sf.Sampler(Untimed(), SCHEDULE, steps=2, graph="step", max_programs=2)
    for size in (8, 10, 12):
        sampler.sample((1, 1, size, size))
    stats = sampler.stats()
    assert (stats["captures"], stats["evictions"], stats["programs"]) == (3, 1, 2)
    assert stats["replays"] == 6
    sampler.sample((1, 1, 12, 12))
    assert sampler.stats()["captures"] == 3, "the last shape is still there"
    sampler.sample((1, 1, 8, 8))
    assert sampler.stats()["captures"] == 4, "the first was evicted"


def test_bytes_are_those_of_the_buffers() -> None:
    sampler = sf.Sampler(Untimed(), SCHEDULE, steps=2, graph=None)
    sampler.sample((1, 1, 8, 8))
    small = sampler.stats()["bytes"]
    sampler.reset()
    sampler.sample((1, 1, 16, 16))
    assert sampler.stats()["bytes"] - small == 2 * (256 - 64) * 4, "x and x0"


def test_an_eviction_while_a_result_is_held_is_safe() -> None:
    sampler = sf.Sampler(Untimed(), SCHEDULE, steps=2, graph="step", max_programs=1)
    steps = list(sampler.iterate((1, 1, 8, 8)))
    kept = [step.x.clone() for step in steps]
    sampler.sample((1, 1, 9, 9))
    assert all(torch.equal(step.x, x) for step, x in zip(steps, kept, strict=True))


def test_training_mode_has_a_program_of_its_own() -> None:
    torch.manual_seed(0)
    net = Untimed()
    net.inner.insert(1, nn.BatchNorm2d(4))
    sampler = sf.Sampler(net.eval(), SCHEDULE, steps=2, graph="step")
    sampler.sample((4, 1, 8, 8))
    net.train()
    sampler.sample((4, 1, 8, 8))
    assert sampler.stats()["programs"] == 2


@pytest.mark.parametrize(("name", "value"), [("graph", "loops"), ("max_programs", 0)])
def test_bad_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=str(value)):
        sf.Sampler(Untimed(), SCHEDULE, **{name: value})


def test_explain_tells_the_plan() -> None:
    sampler = sf.Sampler(
        Untimed(), SCHEDULE, steps=5, eta=0.5, guidance=sf.CFG(2.0, interval=(300, 600))
    )
    text = sampler.explain()
    assert "ddim, eta=0.5, epsilon, x0 clipped at 1" in text
    assert "5 steps, timesteps 800 .. 0" in text
    assert f"{sampler.num_function_evaluations} per sample" in text
    assert sampler.num_function_evaluations == 5 + 2, "400 and 600 are guided"
    sampler.sample((1, 1, 8, 8))
    assert "captured" in sampler.explain()
