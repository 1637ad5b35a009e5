"""TensorRTDenoiser without a GPU: a library made of PyTorch takes the place of TensorRT.

It gets names, shapes, addresses and a stream, as TensorRT does, and computes from what it finds in
memory. What it cannot show is that TensorRT itself agrees: that has never been run.
"""

from __future__ import annotations

import copy
import ctypes
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.metadata import Metadata
from stepfuse.engine.export.to_tensorrt import library as tensorrt_library
from stepfuse.engine.export.to_tensorrt import runtime as tensorrt_runtime
from stepfuse.engine.export.to_tensorrt.engine_file import (
    BadEngineFile,
    EngineInfo,
    TensorSpec,
    write_engine,
)
from stepfuse.engine.export.to_tensorrt.library import Library, find_library
from stepfuse.engine.export.to_tensorrt.runtime import TensorRTDenoiser
from stepfuse.kernels.backends import BackendUnavailable

STREAM = 77
INPUTS = (
    TensorSpec("x", (-1, 2, 4, 4), "float16"),
    TensorSpec("t", (-1,), "int64"),
    TensorSpec("labels", (-1,), "int64"),
)
METADATA = Metadata(
    schedule=sf.Schedule.linear(100),
    prediction_type="epsilon",
    sample_shape=(2, 4, 4),
    num_classes=5,
    label_input="labels",
)


def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """What the engine computes."""
    factor = 0.01 * t + 0.1 * labels
    return (x.float() * factor.view(-1, 1, 1, 1)).half()


def memory(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor at an address."""
    count = torch.empty(shape, dtype=dtype, device="meta").nbytes
    raw = (ctypes.c_char * count).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


class Context:
    """An execution context; refuses what TensorRT refuses."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index == 0 and stream == STREAM

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return name in {spec.name for spec in INPUTS}

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in INPUTS if spec.name not in self.shapes]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        x, t, labels = (
            memory(self.addresses[spec.name], self.shapes[spec.name], getattr(torch, spec.dtype))
            for spec in INPUTS
        )
        memory(self.addresses["output"], tuple(x.shape), torch.float16).copy_(model(x, t, labels))
        self.runs += 1
        return stream == STREAM


class Runtime:
    """Makes an engine of a plan, unless the plan is b"bad"."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if plan == b"bad":
            self.logger.log(1, "the plan is for another GPU")
            return None
        return SimpleNamespace(create_execution_context=Context)


class Logger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)


FAKE = Library("tensorrt", SimpleNamespace(__version__="10.0", ILogger=Logger, Runtime=Runtime))


def info(**changes: Any) -> EngineInfo:
    """The header of the engine in these tests."""
    values: dict[str, Any] = {
        "library": "tensorrt",
        "library_version": "10.0",
        "compute_capabilities": (),
        "batch": BatchProfile(1, 2, 4),
        "precision": "fp16",
        "strongly_typed": True,
        "inputs": INPUTS,
        "outputs": (TensorSpec("output", (-1, 2, 4, 4), "float16"),),
        "metadata": METADATA.to_strings(),
        "onnx_sha256": "",
        "layers": (),
        "stepfuse_version": "0",
    }
    return EngineInfo(**{**values, **changes})


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine file; from now on TensorRT is the library above and the CPU is the GPU."""
    monkeypatch.setattr(tensorrt_runtime, "find_library", lambda name: FAKE)
    monkeypatch.setattr(tensorrt_runtime, "_gpu", lambda device: torch.device("cpu"))
    monkeypatch.setattr(tensorrt_runtime, "_stream", lambda device: STREAM)
    write_engine(tmp_path / "unet.engine", info(), b"plan")
    return tmp_path / "unet.engine"


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and labels."""
    x = torch.randn(count, 2, 4, 4).half()
    return x, torch.arange(count) * 9 + 1, torch.arange(count) % 5


def test_predictions_of_every_batch(engine: Path) -> None:
    denoiser = TensorRTDenoiser(engine)
    for count in (1, 3, 4, 2, 3):
        x, t, labels = inputs(count)
        assert torch.equal(denoiser(x, t, labels=labels), model(x, t, labels))
    # one context per batch size, which a captured graph can rely on
    assert sorted(denoiser._contexts) == [1, 2, 3, 4]
    assert denoiser._contexts[3].runs == 2
    assert denoiser.metadata == METADATA
    assert denoiser.schedule == METADATA.schedule
    assert (denoiser.prediction_type, denoiser.sample_shape) == ("epsilon", (2, 4, 4))


def test_inputs_are_read_where_they_are(engine: Path) -> None:
    denoiser = TensorRTDenoiser(engine)
    x, t, labels = inputs(3)
    denoiser(x, t, labels=labels)
    addresses = denoiser._contexts[3].addresses
    assert [addresses[name] for name in ("x", "t", "labels")] == [
        v.data_ptr() for v in (x, t, labels)
    ]


def test_other_types_and_gaps_are_copied_into_one_buffer(engine: Path) -> None:
    denoiser = TensorRTDenoiser(engine)
    x, t, labels = inputs(3)
    wide, slow = x.float(), x.to(memory_format=torch.channels_last)
    expected = model(x, t, labels)
    assert torch.equal(denoiser(wide, t.int(), labels=labels), expected)
    first = dict(denoiser._contexts[3].addresses)
    assert torch.equal(denoiser(slow, t.float(), labels=labels.int()), expected)
    second = dict(denoiser._contexts[3].addresses)
    assert (first["x"], first["t"]) == (second["x"], second["t"])
    assert torch.equal(denoiser(torch._neg_view(-x), t, labels=labels), expected)


def test_a_call_allocates_nothing(engine: Path) -> None:
    denoiser = TensorRTDenoiser(engine)
    x, t, labels = inputs(4)
    wide = x.float()
    results = [denoiser(wide, t, labels=labels).data_ptr() for _ in range(5)]
    assert results[0] == results[2] == results[4] != results[1] == results[3]
    # so the two predictions of guidance in separate calls are both valid
    a = denoiser(x, t, labels=labels)
    kept = a.clone()
    denoiser(2 * x, t, labels=labels)
    assert torch.equal(a, kept)


def test_missing_labels_are_the_null_class(engine: Path) -> None:
    denoiser = TensorRTDenoiser(engine)
    x, t, _ = inputs(2)
    expected = model(x, t, torch.full((2,), 5))
    assert torch.equal(denoiser(x, t), expected)
    assert torch.equal(denoiser(x, t, labels=None), expected)


@pytest.mark.parametrize("batched", [True, False])
def test_inside_a_sampler(engine: Path, batched: bool) -> None:
    labels = torch.tensor([1, 4])
    null = torch.tensor([5]) if batched else None

    def plain(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return model(x.half(), t, torch.full((len(x),), 5) if labels is None else labels)

    pictures = []
    for network in (TensorRTDenoiser(engine), plain):
        sampler = sf.Sampler(
            network,
            METADATA.schedule,
            steps=5,
            guidance=sf.CFG(2.0, unconditional={"labels": null}, batched=batched),
            graph=None,
        )
        pictures.append(sampler.sample((2, 2, 4, 4), seed=1, condition={"labels": labels}))
    assert torch.equal(*pictures)


def test_copies_open_the_file_again(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine.parent)
    denoiser = TensorRTDenoiser(engine.name, results=3)
    x, t, labels = inputs(3)
    expected = denoiser(x, t, labels=labels).clone()
    monkeypatch.chdir("/")
    twins = [copy.copy(denoiser), copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))]
    for twin in twins:
        assert (twin._contexts, len(twin._results)) == ({}, 3)
        assert torch.equal(twin(x, t, labels=labels), expected)


def test_labels_out_of_range_are_refused_before_the_steps(engine: Path) -> None:
    sampler = sf.Sampler(TensorRTDenoiser(engine), METADATA.schedule, steps=2)
    with pytest.raises(ValueError, match=r"label 6 is out of range; accepted: 0\.\.4, or 5"):
        sampler.sample((2, 2, 4, 4), condition={"labels": [1, 6]})


def test_what_the_engine_does_not_take(engine: Path) -> None:
    denoiser = TensorRTDenoiser(engine)
    x, t, labels = inputs(2)
    with pytest.raises(ValueError, match=r"batch 5 is outside the profile; accepted: 1 \.\. 4"):
        denoiser(*inputs(5)[:2])
    with pytest.raises(ValueError, match=r"x has shape \(2, 2, 4, 2\); accepted: \(2, 2, 4, 4\)"):
        denoiser(x[..., :2], t)
    with pytest.raises(ValueError, match="t has shape"):
        denoiser(x, t[:1])
    with pytest.raises(ValueError, match="has no input 'text'; accepted: labels"):
        denoiser(x, t, text=labels)
    with pytest.raises(ValueError, match=r"results must be in 1 \.\. 1024; got 0"):
        TensorRTDenoiser(engine, results=0)


def test_an_input_that_must_be_given(engine: Path) -> None:
    write_engine(engine, info(metadata={}), b"plan")
    denoiser = TensorRTDenoiser(engine)
    assert denoiser.metadata is None
    with pytest.raises(ValueError, match="needs the input 'labels'"):
        denoiser(*inputs(2)[:2])


def test_a_plan_that_the_library_refuses(engine: Path) -> None:
    write_engine(engine, info(), b"bad")
    with pytest.raises(BackendUnavailable, match="the plan is for another GPU"):
        TensorRTDenoiser(engine)
    write_engine(engine, info(library_version="10.1"), b"plan")
    with pytest.raises(BadEngineFile, match=r"built by tensorrt 10\.1 .* here is tensorrt 10\.0"):
        TensorRTDenoiser(engine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    try:
        library = find_library()
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    path = tmp_path / "unet.engine"
    write_engine(path, info(library=library.name, library_version=library.version), b"plan")
    with pytest.raises(BackendUnavailable, match="runs on an NVIDIA GPU, and PyTorch"):
        TensorRTDenoiser(path)


def test_a_library_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="library must be one of tensorrt, tensorrt_rtx or None"):
        find_library("cudnn")


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "MODULES", {"tensorrt": ("no_such_tensorrt",)})
    tensorrt_library._import.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"tensorrt is not there \(not installed\); `pip"):
        find_library("tensorrt")
    tensorrt_library._import.cache_clear()
