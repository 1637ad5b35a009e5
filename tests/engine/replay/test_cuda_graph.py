"""CUDA graphs of a step, on a device that is pretended: what they hold, and how they fail."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from tests.engine.compile.fake_cuda import fake_cuda
from tests.engine.replay.pretended_cuda import Freed, PretendedCuda, pretend
from torch import Tensor

from stepfuse.engine.replay.capture import CaptureRefused
from stepfuse.engine.replay.cuda_graph import WARM_UPS, CudaGraph

CPU = torch.device("cpu")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    return pretend(monkeypatch)


class Doubling:
    """A step that doubles x; ``at_call`` does something else in one of its calls."""

    def __init__(self, at_call: int = 0, other: Any = None) -> None:
        self.x, self.calls = torch.ones(3), 0
        self._at_call, self._other = at_call, other

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self._at_call:
            self._other()
        self.x.mul_(2)


REHEARSAL, CAPTURE = WARM_UPS + 1, WARM_UPS + 2


def test_the_pretended_graph_holds_nothing(api: PretendedCuda) -> None:
    x, weight, graph = torch.ones(3), torch.full((3,), 2.0), api.CUDAGraph()
    with api.stream(api.Stream()):
        graph.capture_begin()
        x.mul_(weight + 1)
        graph.capture_end()
    graph.replay()
    assert torch.equal(x, torch.full((3,), 9.0))
    del weight
    with pytest.raises(Freed):
        graph.replay()


def test_a_graph_does_what_the_step_does(api: PretendedCuda) -> None:
    step = Doubling()
    graph = CudaGraph(step, CPU, repeat=3, api=api)
    step.x.fill_(1)
    graph.replay()
    graph.replay()
    assert torch.equal(step.x, torch.full((3,), 64.0))
    assert step.calls == WARM_UPS + 1 + 3, "three warm-ups and the capture of three"


def test_a_graph_keeps_what_it_reads(api: PretendedCuda) -> None:
    """Also where it lies in tuples, is made by a warm-up, or is of a kind that has no address."""
    x, parts = torch.ones(2), [torch.ones(1), torch.full((1,), 2.0)]
    cache: dict[str, Tensor] = {"sparse": torch.eye(2).to_sparse()}

    def step() -> None:
        table = cache.setdefault("table", torch.full((2,), 3.0))
        x.copy_(torch.cat(parts) * table + torch.mv(cache["sparse"], x))

    graph = CudaGraph(step, CPU, api=api)
    x.fill_(1)
    parts.clear()
    cache.clear()
    gc.collect()
    graph.replay()
    assert torch.equal(x, torch.tensor([4.0, 7.0]))
    assert len(graph.read.tensors) == 5


def test_a_graph_holds_until_a_tensor_moves(api: PretendedCuda) -> None:
    x, weight = torch.ones(3), torch.ones(3)
    graph = CudaGraph(lambda: x.add_(weight), CPU, api=api)
    assert graph.holds()
    weight.data = torch.ones(3)
    assert not graph.holds()


def test_a_capture_is_of_this_thread_and_off_the_default_stream(api: PretendedCuda) -> None:
    CudaGraph(Doubling(), CPU, api=api)
    ((_, side, mode),) = [entry for entry in api.log if entry[0] == "capture"]
    assert mode == "thread_local"
    here = api.default[0]
    waits = [entry for entry in api.log if entry[0] == "wait_stream"]
    assert waits == [("wait_stream", side, here), ("wait_stream", here, side)]
    assert api.log.index(waits[1]) < api.log.index(("capture", side, mode))


def test_graphs_of_one_pool(api: PretendedCuda) -> None:
    first = CudaGraph(Doubling(), CPU, api=api)
    second = CudaGraph(Doubling(), CPU, pool=first.pool, api=api)
    third = CudaGraph(Doubling(), CPU, api=api)
    assert first.pool == second.pool != third.pool
    assert api.users[first.pool] == 2


def failing(api: PretendedCuda) -> dict[str, tuple[Doubling, type[Exception], str]]:
    """Steps that fail, with the error and what it says."""

    def raises(error: Exception) -> Any:
        def other() -> None:
            raise error

        return other

    def refused_at_the_end() -> None:
        api.failures.append("operation failed due to a previous error during capture")

    def broken_in_the_middle() -> None:
        refused_at_the_end()
        raise RuntimeError("operation not permitted")

    value = torch.ones(1)
    return {
        "warm-up": (Doubling(1, raises(ValueError("the model's"))), ValueError, "the model's"),
        "wait": (
            Doubling(REHEARSAL, raises(RuntimeError("a synchronizing operation"))),
            CaptureRefused,
            r"the host may not wait: a synchronizing operation, at .*test_cuda_graph\.py",
        ),
        "host read": (Doubling(REHEARSAL, value.item), CaptureRefused, "_local_scalar_dense"),
        "copy": (Doubling(REHEARSAL, value.tolist), CaptureRefused, "copies a tensor"),
        "begin": (
            Doubling(REHEARSAL, lambda: api.refusals.append("operation not supported")),
            CaptureRefused,
            "could not be captured: operation not supported",
        ),
        "middle": (
            Doubling(CAPTURE, raises(RuntimeError("out of memory"))),
            CaptureRefused,
            "could not be captured: out of memory",
        ),
        "interrupt": (Doubling(CAPTURE, raises(KeyError("k"))), KeyError, "k"),
        "end": (Doubling(CAPTURE, refused_at_the_end), CaptureRefused, "due to a previous error"),
        "middle and end": (
            Doubling(CAPTURE, broken_in_the_middle),
            CaptureRefused,
            "could not be captured: operation not permitted",
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "warm-up",
        "wait",
        "host read",
        "copy",
        "begin",
        "middle",
        "interrupt",
        "end",
        "middle and end",
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_capture_that_fails_leaves_nothing_behind(
    api: PretendedCuda, name: str, shared: bool
) -> None:
    kept = CudaGraph(Doubling(), CPU, api=api)
    api.set_sync_debug_mode("warn")
    step, error, message = failing(api)[name]
    before = api.state()
    pool = kept.pool if shared else None
    with pytest.raises(error, match=message) as caught:
        CudaGraph(step, CPU, pool=pool, api=api)
    del caught
    gc.collect()
    assert api.state() == before
    begun = step.calls >= CAPTURE
    assert begun == (name in ("middle", "interrupt", "end", "middle and end"))
    api.empty_cache()
    later = Doubling()
    graph = CudaGraph(later, CPU, pool=pool, api=api)
    later.x.fill_(1)
    graph.replay()
    assert torch.equal(later.x, torch.full((3,), 2.0))
    assert api.state()[2] == 1, "the mode of whoever sampled"


def test_a_step_that_leaves_another_stream_as_the_current_one(api: PretendedCuda) -> None:
    other = api.Stream()

    def step() -> None:
        api._streams[0] = other
        x.add_(1)

    x = torch.ones(1)
    CudaGraph(step, CPU, api=api)
    assert api.current_stream() is api.default[0]


@pytest.mark.parametrize("alone", [True, False])
def test_waits_are_refused_in_the_rehearsal_alone(
    api: PretendedCuda, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """And not while other threads run, whose waits would be refused, too."""
    monkeypatch.setattr(threading, "active_count", lambda: 1 if alone else 2)
    modes, x = [], torch.ones(1)

    def step() -> None:
        modes.append(api.get_sync_debug_mode())
        x.add_(1)

    CudaGraph(step, CPU, api=api)
    assert modes == [*[0] * WARM_UPS, 2 if alone else 0, 0]


@pytest.mark.parametrize("number", [0, 1])
def test_everything_happens_on_the_devices_own_streams(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    api = pretend(monkeypatch, devices=2)
    device, at = torch.device("cuda", number), []
    own = api.Stream(device)
    with fake_cuda():
        x = torch.ones(1, device=device)

        def step() -> None:
            at.append((api.current_device(), api.current_stream().device))
            x.add_(1)

        graph = CudaGraph(step, device, api=api)
        with api.stream(own), api.device(0):
            graph.replay()
    assert at == [(number, number)] * (WARM_UPS + 2)
    (begun,) = [entry for entry in api.log if entry[0] == "capture"]
    assert begun[1].device == number
    assert api.log[-1] == ("replay", own), "the current stream of the graph's device"
    assert api.current_device() == 0


ON_DEVICE = torch.device("cuda", 0)


def on_the_host(api: PretendedCuda, use: Any) -> CudaGraph:
    """A step on CUDA that uses a tensor on the host, too."""
    host = torch.tensor(2.0)
    with fake_cuda():
        x = torch.ones(2, device=ON_DEVICE)
        return CudaGraph(lambda: use(x, host), ON_DEVICE, api=api)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda x, host: x * host,
            r"aten\.mul\.Tensor reads a tensor on the host, .*at .*test_cuda",
        ),
        (lambda x, host: x * (host + 1), r"aten\.add\.Tensor reads a tensor on the host"),
        (lambda x, host: x.copy_(host), r"aten\.copy_\.default copies between the host and"),
        (lambda x, host: x + torch.tensor(2.0).to(ON_DEVICE), "copies between the host and"),
    ],
)
def test_values_on_the_host_are_refused(api: PretendedCuda, use: Any, message: str) -> None:
    with pytest.raises(CaptureRefused, match=message):
        on_the_host(api, use)
    assert [entry for entry in api.log if entry[0] == "capture"] == []


def test_tensors_that_a_step_makes_on_the_host_are_no_reason(api: PretendedCuda) -> None:
    """As attention makes some, which its backward reads."""
    graph = on_the_host(api, lambda x, host: x.mul_(torch.zeros(()) + 1))
    assert all(tensor.device == ON_DEVICE for tensor in graph.read.tensors)
