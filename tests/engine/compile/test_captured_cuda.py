"""What is asked of CUDA for a captured network, told by a stand-in for `torch.cuda`."""

from __future__ import annotations

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
    """Two devices, the first the current one, and a log of what is asked of them."""

    def __init__(self) -> None:
        self.current = torch.device("cuda", 0)
        self.log: list[str] = []
        self.capturing = False

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    class Graph:
        def __init__(self, step: Callable[[], None], device: torch.device) -> None:
            made.log.append(f"captured on {device}")
            step()
            step()

        def replay(self) -> None:
            made.log.append("replayed")

    monkeypatch.setattr(torch.cuda, "device", made.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(captured, "CudaGraph", Graph)
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
