"""Timesteps on a device: which are known without being read back, and when a table is asked."""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engine.adapters.diffusers_models import build, least_unet2d, noise
from torch import Tensor

from stepfuse.engine.adapters.diffusers import accelerate, explain
from stepfuse.engine.adapters.diffusers.denoiser import forward_of
from stepfuse.engine.adapters.diffusers.forward import Forward
from stepfuse.engine.adapters.diffusers.listed import Listed


class Pipe:
    """What has a scheduler."""

    def __init__(self, timesteps: Any) -> None:
        self.scheduler = SimpleNamespace(timesteps=timesteps)


def listed(*pipes: Any) -> Listed:
    made = Listed()
    for pipe in pipes:
        made.add(pipe)
    return made


def test_an_entry_of_a_list_is_known_by_its_address() -> None:
    pipes = Pipe(torch.tensor([900, 500, 100])), Pipe(torch.tensor([7, 3], dtype=torch.int32))
    found = listed(*pipes)
    for pipe in pipes:
        entries = [found.values(t) for t in pipe.scheduler.timesteps]
        assert entries == [[t] for t in pipe.scheduler.timesteps.tolist()]
    assert found.values(pipes[0].scheduler.timesteps[1:][0]) == [500]
    assert found.values(torch.tensor(500)) is None
    assert found.values(pipes[0].scheduler.timesteps) is None
    assert found.values(pipes[0].scheduler.timesteps[1].expand(4)) == [500]
    assert found.values(torch.tensor(500).expand(4)) is None


def test_new_lists_and_lists_that_were_written_to_are_read_again() -> None:
    pipe = Pipe(torch.tensor([900, 500, 100]))
    found = listed(pipe)
    old = pipe.scheduler.timesteps[1]
    assert found.values(old) == [500]
    pipe.scheduler.timesteps.sub_(1)
    assert found.values(old) == [499]
    pipe.scheduler.timesteps = torch.tensor([800, 400])
    assert found.values(old) is None
    assert found.values(pipe.scheduler.timesteps[1]) == [400]
    assert len(found._read) == 1, "the old list is not held"
    pipe.scheduler = None
    assert found.values(old) is None


@pytest.mark.parametrize(
    "timesteps", [None, [900, 500], torch.tensor([1.5, 0.5]), torch.tensor(5), torch.ones(2, 2)]
)
def test_other_timesteps_are_no_list(timesteps: Any) -> None:
    found = listed(Pipe(timesteps))
    assert found.values(torch.tensor(5)) is None
    assert found.beside([900], 9) == []


def test_what_stands_beside_a_timestep() -> None:
    pipes = Pipe(torch.tensor([900, 500])), Pipe(torch.tensor([500, 2, 1]))
    found = listed(*pipes)
    assert sorted(found.beside([900], 9)) == [500, 900]
    assert sorted(found.beside([500], 9)) == [1, 2, 500, 500, 900]
    assert sorted(found.beside([500], 2)) == [500, 900]
    assert found.beside([3], 9) == []


def test_pipelines_are_not_held_and_not_copied() -> None:
    pipe = Pipe(torch.tensor([900, 500]))
    found = listed(pipe)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.beside([900], 9) == []
    del pipe
    gc.collect()
    assert found.beside([900], 9) == []


class Fast:
    """In the place of compiled networks: what was announced to them."""

    def __init__(self) -> None:
        self.announced: list[list[int]] = []

    def prepare(self, timesteps: Any) -> None:
        self.announced.append(list(timesteps))


class OnDevice(torch.Tensor):
    """A tensor on the CPU that says it is on another device, and counts how often it is read."""

    reads = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self

    def tolist(self) -> Any:
        OnDevice.reads += 1
        return self.as_subclass(Tensor).tolist()


def on_device(values: Any) -> Any:
    return torch.as_tensor(values).as_subclass(OnDevice)


@pytest.fixture
def forward() -> Forward:
    OnDevice.reads = 0
    return Forward(least_unet2d(), None)


SAMPLE = on_device(torch.zeros(2, 3, 8, 8))


def test_a_loop_over_the_list_reads_it_once_and_announces_it_once(forward: Forward) -> None:
    pipe, fast = Pipe(on_device([900, 500, 100])), Fast()
    forward.listed.add(pipe)
    for step in range(3):
        t = forward._timesteps(fast, SAMPLE, pipe.scheduler.timesteps[step])  # type: ignore[arg-type]
        assert t is not None
        assert t.as_subclass(Tensor).tolist() == [[900, 500, 100][step]] * 2
    assert [sorted(set(announced)) for announced in fast.announced] == [[100, 500, 900]]
    assert OnDevice.reads == 1


@pytest.mark.parametrize("timestep", [500, torch.tensor(500), torch.tensor([500])])
def test_a_timestep_on_the_host_is_announced_with_its_list(forward: Forward, timestep: Any) -> None:
    pipe, fast = Pipe(torch.tensor([900, 500, 100])), Fast()
    forward.listed.add(pipe)
    forward._timesteps(fast, SAMPLE, timestep)  # type: ignore[arg-type]
    forward._timesteps(fast, SAMPLE, 100)  # type: ignore[arg-type]
    forward._timesteps(fast, SAMPLE, 7)  # type: ignore[arg-type]
    assert [sorted(set(announced)) for announced in fast.announced] == [[100, 500, 900], [7]]


def test_the_training_schedule_is_not_announced_whole(forward: Forward) -> None:
    pipe, fast = Pipe(torch.arange(1000)), Fast()
    forward.listed.add(pipe)
    forward._timesteps(fast, SAMPLE, 500)  # type: ignore[arg-type]
    assert fast.announced == [[500]]


def test_an_unknown_timestep_is_read_once_there_is_a_table(forward: Forward) -> None:
    fast: Any = Fast()
    unknown = on_device([3, 801])
    assert forward._timesteps(fast, SAMPLE, unknown) is not None
    assert (OnDevice.reads, fast.announced) == (0, []), "computed, not looked up"
    forward._timesteps(fast, SAMPLE, 17)
    assert forward._timesteps(fast, SAMPLE, unknown) is not None
    assert (OnDevice.reads, fast.announced) == (1, [[17], [3, 801]])


def test_what_no_table_can_have_is_left_to_the_original(forward: Forward) -> None:
    fast: Any = Fast()
    for t in (-1, 4096, on_device([5, 5000])):
        assert forward._timesteps(fast, SAMPLE, t) is not None, "there is no table"
    forward._timesteps(fast, SAMPLE, 17)
    for t in (-1, 4096, on_device([5, 5000])):
        assert forward._timesteps(fast, SAMPLE, t) is None
    floating = on_device([3.5, 801.0])
    assert forward._timesteps(fast, SAMPLE, floating) is floating, "no table for these"
    assert fast.announced == [[17]]


def test_while_a_graph_is_captured_nothing_is_read_or_filled(
    forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnDevice, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fast: Any = Fast()
    unknown = on_device([3, 801])
    assert forward._have_rows(fast, unknown, SAMPLE.device)
    assert forward._have_rows(fast, torch.tensor(17), SAMPLE.device)
    forward._announced.add(17)
    assert forward._have_rows(fast, torch.tensor(17), SAMPLE.device)
    assert not forward._have_rows(fast, torch.tensor(18), SAMPLE.device)
    assert not forward._have_rows(fast, unknown, SAMPLE.device)
    assert (OnDevice.reads, fast.announced) == (0, [])


@torch.no_grad()
def test_a_call_that_is_left_to_the_original_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = least_unet2d(), noise(2, 3, 8, 8)
    expected = plain(x, 17).sample
    unet = accelerate(plain)
    monkeypatch.setattr(Forward, "_timesteps", lambda *_: None)
    assert torch.equal(unet(x, 17).sample, expected)
    assert "original forward       1 calls: a timestep that a table may not have" in explain(unet)


def test_a_pipeline_is_known_to_the_forward_of_its_unet(tmp_path: Any) -> None:
    pipe = build("DDIMPipeline", tmp_path)
    accelerate(pipe)
    forward = forward_of(pipe.unet)
    assert forward is not None
    pipe.scheduler.set_timesteps(4)
    assert forward.listed.beside([0], 9) == pipe.scheduler.timesteps.tolist()
    assert forward.listed.values(pipe.scheduler.timesteps[2]) == [250]
