"""Benchmarks of the ops on a GPU: what is captured, timed and refused, without one."""

from __future__ import annotations

import importlib
import itertools
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tests.bench.fake_graphs import FakeCuda
from torch import Tensor

from stepfuse.bench import cuda_graph, harness, timing
from stepfuse.bench.cuda_graph import LAUNCHES, Graphed
from stepfuse.bench.cuda_timing import WARM_UP
from stepfuse.bench.harness import check_device
from stepfuse.kernels.backends import BackendUnavailable

OPS = ("add_noise", "denoise_step", "group_norm_silu", "philox")
CPU_OPS = ("attention", "concatenate", "convolve")


def test_a_block_is_one_graph_of_calls_over_all_inputs() -> None:
    api, seen = FakeCuda(), []
    inputs = itertools.cycle([("a",), ("b",), ("c",)])

    def call(name: str) -> None:
        api.launched(lambda: seen.append(name))

    work = Graphed(call, inputs=inputs, calls=None, api=api)
    work.size(lambda run: run() or 2.0)
    expected = list(itertools.islice(itertools.cycle("abc"), WARM_UP + 1 + LAUNCHES))
    assert seen[: len(expected)] == expected
    assert seen[len(expected) :] == expected[WARM_UP + 1 :], "timed once, to know how long it lasts"
    assert (work.calls, work.lasts) == (LAUNCHES, 2.0)
    assert api.log[0] == "side waits for current"
    assert api.log.index("current waits for side") == 1 + WARM_UP + 1
    assert api.sync_mode == 0
    api.log.clear()
    work.run()
    work.run(1)
    assert api.log == ["replay", "replay"]


def test_what_waits_for_the_device_is_not_captured() -> None:
    api = FakeCuda()
    work = Graphed(api.waits, calls=None, api=api)
    with pytest.raises(RuntimeError, match="synchronizing"):
        work.size(lambda run: 0.0)
    assert api.log == ["side waits for current"]
    assert api.sync_mode == 0, "put back"


@pytest.mark.parametrize("op", OPS)
def test_every_tensor_of_a_case_is_on_its_device(op: str) -> None:
    """And what is not ours runs there; "meta" stands for a device that is not the CPU."""
    bench = importlib.import_module(f"stepfuse.bench.bench_{op}")
    for case in itertools.islice(bench.cases("meta"), 4):
        inputs = case.make()
        tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert case.device == "meta"
        result = case.candidates["eager"](inputs)
        assert result.device.type == "meta"
        assert result.shape == inputs["buffer"].shape


@pytest.mark.parametrize("op", OPS)
def test_the_cpu_is_the_default(op: str) -> None:
    bench = importlib.import_module(f"stepfuse.bench.bench_{op}")
    case = next(iter(bench.cases()))
    assert case.device == "cpu"
    assert {v.device.type for v in case.make().values() if isinstance(v, Tensor)} == {"cpu"}


@pytest.mark.parametrize("op", CPU_OPS)
def test_ops_of_the_cpu_refuse_another_device(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = importlib.import_module(f"stepfuse.bench.bench_{op}")
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--device must be one of cpu; got 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("tpu", ValueError, "--device must be one of cpu, cuda; got 'tpu'"),
        ("cuda:x", ValueError, "--device must be like cuda or cuda:1; got 'cuda:x'"),
        ("cuda", BackendUnavailable, "--device cuda needs a GPU, and PyTorch sees none here"),
    ],
)
def test_devices_that_are_not_there(
    name: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=said):
        check_device(name, ("cpu", "cuda"))


def test_a_case_on_a_gpu_is_measured_by_graphs_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is a graph, timed by the device's timer after its warm-up, with max-autotune."""
    api, compiled, tf32 = FakeCuda(), [], []
    monkeypatch.setattr(torch, "cuda", api)
    monkeypatch.setattr(cuda_graph, "torch", SimpleNamespace(cuda=api))
    monkeypatch.setattr(timing, "timer_for", lambda device: (lambda run: run() or 1.0, WARM_UP))
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1 << 10)
    monkeypatch.setattr(harness, "tf32_off", lambda device: tf32.append(device) or nullcontext())
    monkeypatch.setattr(harness, "_copy", lambda traffic, device: lambda inputs: None)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda call, **how: compiled.append(how) or call)
    call = {name: lambda inputs: None for name in ("stepfuse", "out=", "eager")}
    case = harness.Case(
        "tiny", torch.float32, dict, call, 32, lambda: None, call["eager"], device="cuda:1"
    )
    result = harness.measure(case, 2, with_compile=True)
    assert tf32 == [torch.device("cuda", 1)]
    assert api.log.count("on cuda:1") == 1
    assert [how["mode"] for how in compiled] == ["max-autotune-no-cudagraphs"]
    names = {"stepfuse", "out=", "eager", "copy", "compile", "stepfuse beside compile"}
    assert result.samples.keys() == names
    assert all(seconds == [1.0 / LAUNCHES] * 2 for seconds in result.samples.values())
    assert api.log.count("replay") == len(names) * (1 + WARM_UP + 2)
