"""What is asked of CUDA for a captured network, told by a stand-in for `torch.cuda`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import small
from torch import Tensor

from stepfuse.engine.compile import captured
from stepfuse.engine.compile.captured import CudaGraphs
from stepfuse.engine.compile.optimize import optimize

SECOND = torch.device("cuda", 1)


class Machine:
    """Two devices, the first the current one, with streams and events that note what they do."""

    def __init__(self) -> None:
        self.current = torch.device("cuda", 0)
        self.log: list[str] = []
        self.stream = Stream("a", self)
        self.capturing = False

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before


class Stream:
    def __init__(self, name: str, machine: Machine) -> None:
        self.name, self._machine = name, machine

    def wait_event(self, event: Any) -> None:
        self._machine.log.append(f"{self.name} waits for {event.at}")


class Buffer:
    """A tensor that notes on which streams it is said to be used."""

    def __init__(self) -> None:
        self.streams: list[str] = []

    def record_stream(self, stream: Stream) -> None:
        self.streams.append(stream.name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    class Event:
        at = ""

        def record(self, stream: Stream) -> None:
            self.at = stream.name
            made.log.append(f"recorded on {stream.name}")

    class Graph:
        def __init__(self, step: Callable[[], None], *_: torch.device) -> None:
            made.log.append(f"captured on {made.current}")
            step()
            step()

        def replay(self) -> None:
            made.log.append("replayed")

    monkeypatch.setattr(torch.cuda, "device", made.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(importlib.import_module(captured._HOME), "CudaGraph", Graph)
    return made


def test_the_graph_is_captured_on_the_device_of_the_network(machine: Machine) -> None:
    runs: list[Tensor] = []

    def run() -> list[Any]:
        runs.append(torch.ones(1))
        return [runs[-1], 3]

    graph = CudaGraphs().capture(run, SECOND)
    # the results of the last run lie in the memory of the graph
    assert graph.results[0] is runs[-1]
    assert graph.results[1] == 3
    graph.replay()
    assert machine.log == ["captured on cuda:1", "replayed"]
    assert machine.current == torch.device("cuda", 0)


def test_a_launch_on_another_stream_waits_for_the_last(machine: Machine) -> None:
    order, buffer = CudaGraphs().order(SECOND), Buffer()
    a, b = machine.stream, Stream("b", machine)
    for stream in (a, a, b, b, a):
        machine.stream = stream
        with order.turn([buffer]):  # type: ignore[list-item]
            machine.log.append(f"launched on {stream.name}")
    assert machine.log == [
        *("launched on a", "recorded on a"),
        *("launched on a", "recorded on a"),
        *("b waits for a", "launched on b", "recorded on b"),
        *("launched on b", "recorded on b"),
        *("a waits for b", "launched on a", "recorded on a"),
    ]
    assert buffer.streams == ["b", "a"]


def test_a_capture_by_somebody_else_is_seen(machine: Machine) -> None:
    assert not CudaGraphs().busy()
    machine.capturing = True
    assert CudaGraphs().busy()


@torch.no_grad()
def test_tensors_of_the_host_ask_nothing_of_cuda(machine: Machine) -> None:
    model, inputs = small()
    fast = optimize(model, inputs)
    assert torch.equal(fast(*inputs), fast(*inputs))
    assert machine.log == []
