"""A sampler whose steps are CUDA graphs, on a device that is pretended."""

from __future__ import annotations

import functools
import random
import threading
from typing import Any

import pytest
import torch
from tests.engine.compile.fake_cuda import fake_cuda
from tests.engine.compile.networks import own
from tests.engine.replay.pretended_cuda import PretendedCuda, pretend
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.replay.cuda_graph import WARM_UPS, CudaGraph, _Rehearsal
from stepfuse.engine.replay.device_order import DeviceOrder
from stepfuse.engine.sampling import lint, program_cache
from stepfuse.engine.sampling import sampler as sampler_module

SCHEDULE = sf.Schedule.linear()
CUDA = torch.device("cuda", 0)
# products in another order, through the clipped steps of a loop
SAME_IMAGES = 1e-3


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    """Programs on the CPU are captured as those on CUDA are."""
    api = pretend(monkeypatch)
    monkeypatch.setattr(program_cache, "_has_graphs", lambda device: True)
    monkeypatch.setattr(program_cache, "CudaGraph", functools.partial(CudaGraph, api=api))
    monkeypatch.setattr(sampler_module, "DeviceOrder", lambda device: DeviceOrder(CUDA, api))
    return api


def unet() -> nn.Module:
    torch.manual_seed(0)
    return own(num_classes=3, base_channels=8)[0]


def labels(count: int) -> dict[str, Tensor]:
    return {"labels": torch.arange(count) % 3}


class Timed(nn.Module):
    """A small image model that depends on the timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x) * torch.cos(t.to(x.dtype) / 300).view(-1, 1, 1, 1)


def assert_same(sampler: sf.Sampler, model: nn.Module, count: int, atol: float) -> None:
    shape, condition = (count, 3, 8, 8), labels(count)
    eager = sf.Sampler(
        model, SCHEDULE, steps=len(sampler.timesteps), graph=None, guidance=sampler.guidance
    )
    expected = eager.sample(shape, seed=count, condition=condition)
    got = sampler.sample(shape, seed=count, condition=condition)
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)
    assert sampler.stats()["eager_steps"] == 0, sampler.explain()


def test_networks_outlive_the_graphs_that_read_them(api: PretendedCuda) -> None:
    """Replays are no calls of the network, which the cache of networks sees as long out of use."""
    model = unet()
    sampler = sf.Sampler(model, SCHEDULE, steps=3, optimize=True, max_programs=2)
    for count in (1, 2, 1, 3, 1, 4, 1, 5, 1):
        assert_same(sampler, model, count, SAME_IMAGES)
    stats = sampler.stats()
    assert (stats["captures"], stats["evictions"], stats["programs"]) == (5, 3, 2)


def test_both_networks_of_a_guided_step_are_kept_beside_one(api: PretendedCuda) -> None:
    model = unet()
    inputs = (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), labels(2))
    fast = sf.optimize(model, inputs, max_networks=1)
    guidance = sf.CFG(2.0, unconditional={"labels": None})
    sampler = sf.Sampler(fast, SCHEDULE, steps=3, guidance=guidance)
    for _ in range(3):
        assert_same(sampler, model, 2, SAME_IMAGES)
    assert sampler.stats()["captures"] == 1
    assert len(fast.networks) == 2
    sampler.reset()
    fast(torch.zeros(1, 3, 8, 8), inputs[1][:1], **labels(1))
    assert len(fast.networks) == 1, "nothing reads the others any more"


@pytest.mark.parametrize("graph", ["step", "loop"])
def test_what_python_decides_anew_in_every_step_is_refused(api: PretendedCuda, graph: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * random.random()

    sampler = sf.Sampler(model, SCHEDULE, steps=3, graph=graph, clip_sample=None)
    assert bool(sampler.sample((1, 1, 4, 4)).isfinite().all())
    assert "differs from the eager step" in sampler.explain()
    assert (sampler.stats()["captures"], sampler.stats()["eager_steps"]) == (0, 3)


@pytest.mark.parametrize("graph", ["step", "loop"])
def test_a_refused_capture_is_no_end_of_captures(api: PretendedCuda, graph: str) -> None:
    before, x_T = api.state(), torch.randn(2, 1, 4, 4)
    sampler = sf.Sampler(Timed(), SCHEDULE, steps=3, graph=graph)
    api.failures.append("operation failed due to a previous error during capture")
    expected = sampler.sample((2, 1, 4, 4), x_T=x_T)
    assert "due to a previous error" in sampler.explain()
    assert api.state() == before
    sampler.reset()
    assert torch.equal(sampler.sample((2, 1, 4, 4), x_T=x_T), expected)
    assert sampler.stats()["captures"] == 1


def test_a_graph_that_leaves_no_memory_for_eager_steps_is_dropped(api: PretendedCuda) -> None:
    calls, short = [], WARM_UPS + 3  # the rehearsal, the capture, and then the eager step

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == short:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.5 * x

    sampler = sf.Sampler(model, SCHEDULE, steps=3)
    expected = sf.Sampler(lambda x, t: 0.5 * x, SCHEDULE, steps=3, graph=None)
    assert torch.equal(sampler.sample((1, 1, 4, 4)), expected.sample((1, 1, 4, 4)))
    assert "no memory to compare a replay" in sampler.explain()
    assert not any(api.users.values()), "the graph has gone"


def test_a_few_loops_of_other_lengths_are_kept(api: PretendedCuda) -> None:
    model = Timed()
    sampler = sf.Sampler(model, SCHEDULE, graph="loop", eta=0.5)

    def images(steps: int) -> None:
        sampler.set_timesteps(steps)
        eager = sf.Sampler(model, SCHEDULE, graph=None, eta=0.5, steps=steps)
        assert torch.equal(sampler.sample((1, 1, 6, 6)), eager.sample((1, 1, 6, 6)))

    def counts() -> tuple[int, int]:
        stats = sampler.stats()
        assert stats["eager_steps"] == 0, sampler.explain()
        return stats["captures"], stats["evictions"]

    for steps in (2, 3, 4, 5, 2):
        images(steps)
    assert counts() == (4, 0)
    images(6)
    assert counts() == (5, 1)
    images(2)
    assert counts() == (5, 1), "it was used last before"
    images(3)
    assert counts() == (6, 2), "3 had gone, and 4 is next"
    images(1)
    images(2)
    assert counts() == (7, 2), "one step is no loop"
    assert len({entry for entry in api.users if api.users[entry]}) == 1, "one pool for all"


def test_a_run_begins_after_the_one_before_on_another_stream(api: PretendedCuda) -> None:
    sampler = sf.Sampler(Timed(), SCHEDULE, steps=2)
    streams = [api.Stream(0) for _ in range(2)]
    ends = []
    for stream in streams:
        with api.stream(stream):
            sampler.sample((1, 1, 4, 4))
        ends.append(api.log[-1])
    assert ends == [("record", stream) for stream in streams]
    launched = [entry[0] for entry in api.log if entry[1] is streams[1]]
    assert launched == ["wait_event", "replay", "replay", "record"]
    assert streams[1].after[0][0] is streams[0]


def test_a_walk_may_go_on_on_other_streams(api: PretendedCuda) -> None:
    sampler = sf.Sampler(Timed(), SCHEDULE, steps=3)
    expected = sampler.sample((1, 1, 4, 4))
    streams = [api.Stream(0) for _ in range(4)]
    with api.stream(streams[0]):
        walk = sampler.iterate((1, 1, 4, 4))
    for stream, before in zip(streams[1:], streams, strict=False):
        with api.stream(stream):
            step = next(walk)
        assert before in [event[0] for event in stream.after]
        assert api.log[-1] == ("record", stream)
    assert torch.equal(step.x, expected)
    walk.close()
    with api.stream(streams[0]):
        sampler.sample((1, 1, 4, 4))
    assert streams[0].after, "it waits for the walk, which was closed elsewhere"


def test_a_callback_may_change_the_stream(api: PretendedCuda) -> None:
    sampler = sf.Sampler(Timed(), SCHEDULE, steps=2)
    other = api.Stream(0)

    def switch(step: sf.Step) -> None:
        api._streams[0] = other

    sampler.sample((1, 1, 4, 4), callback=switch)
    assert other.after[0][0] is api.default[0]


def test_memory_is_given_back_when_the_device_has_done_with_it(api: PretendedCuda) -> None:
    def waits(do: Any) -> int:
        api.log.clear()
        do()
        return [entry[0] for entry in api.log].count("synchronize")

    sampler = sf.Sampler(Timed(), SCHEDULE, steps=2, max_programs=1)
    assert waits(lambda: sampler.sample((1, 1, 4, 4))) == 0
    assert waits(lambda: sampler.sample((1, 1, 5, 5))) == 1, "the other shape is dropped"
    weight = sampler.denoiser.module.inner.weight
    weight.data = weight.data.clone()
    assert waits(lambda: sampler.sample((1, 1, 5, 5))) == 1, "it is captured again"
    assert waits(sampler.reset) == 1
    assert waits(sampler.reset) == 0


def test_threads_and_streams_have_their_own_images(api: PretendedCuda) -> None:
    sampler = sf.Sampler(Timed(), SCHEDULE, steps=3, eta=1.0)
    expected = [sampler.sample((1, 1, 4, 4), seed=seed) for seed in range(3)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = sampler.sample((1, 1, 4, 4), seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], image) for seed, image in enumerate(expected))
    for seed in range(3):
        with api.stream(api.Stream(0)):
            assert torch.equal(sampler.sample((1, 1, 4, 4), seed=seed), expected[seed])
    kinds = [entry[0] for entry in api.log if entry[0] in ("wait_event", "record")]
    assert kinds[-6:] == ["wait_event", "record"] * 3, "one after the other"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ddpm"},
        {"guidance": sf.CFG(2.0, {"labels": None})},
        {"guidance": sf.CFG(2.0, {"labels": torch.tensor(1)}, batched=True), "optimize": True},
    ],
)
def test_nothing_of_our_own_steps_is_on_the_host(settings: dict[str, Any]) -> None:
    """Seen on CUDA tensors without data, as a rehearsal looks at them."""
    sampler = sf.Sampler(unet(), SCHEDULE, steps=2, **settings)
    conditions = lint._conditions(sampler, 2, labels(2))
    with fake_cuda():
        program = lint._fake_program(sampler, (2, 3, 8, 8), conditions)
        program.advance(True)
        with _Rehearsal(CUDA) as rehearsal:
            program.advance(True)
    read = rehearsal.read.tensors
    assert {tensor.device for tensor in read} == {CUDA}
    assert {id(program.x), id(program.table), id(program.step)} <= {id(tensor) for tensor in read}
