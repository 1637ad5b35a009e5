"""Export and the runtimes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.api import world
from tests.api.case import Call
from tests.engine.export.export_case import exported
from tests.engine.export.onnx_case import SCHEDULE, Small, build_once, inputs
from tests.engine.export.test_tensorrt_engine import save_graph
from tests.engine.export.test_tensorrt_runtime import FAKE, STREAM, info
from tests.engine.export.test_tensorrt_runtime import inputs as engine_inputs

import stepfuse as sf
from stepfuse.engine.export.to_onnx import loop_file
from stepfuse.engine.export.to_onnx import network_file as onnx_file
from stepfuse.engine.export.to_tensorrt import runtime as tensorrt_runtime
from stepfuse.engine.export.to_tensorrt.engine_file import write_engine

PATH = ("is not there", "cannot read", "No such file", "is a folder")
# what only some networks say themselves has to be given for this one
UNKNOWN_NETWORK = {"None"}
# a denoiser is traced with fake tensors, all of them or none
FAKE_TENSORS = {"as a fake tensor"}
_numbers = itertools.count()


def target(ending: str) -> Path:
    """A path where nothing is."""
    return Path(world.folder.name) / f"{next(_numbers)}{ending}"


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, the graph of a network built only once."""

    def call(**arguments: Any) -> Any:
        with (
            mock.patch.object(onnx_file, "build", build_once),
            mock.patch.object(loop_file, "build", build_once),
        ):
            return function(**arguments)

    return call


def exporting() -> Call:
    return Call(
        remembering(sf.export.onnx),
        {
            "model": Small(), "path": target(".onnx"), "example_inputs": inputs(),
            "batch": 2, "verify": False,
        },
        {"example_inputs": {"as a list"}, "path": {"a text"}},
        named={"path": PATH},
        instead={"schedule": SCHEDULE, "sample_shape": (2, 6, 6), "opset": 21},
        undefined={"example_inputs": UNKNOWN_NETWORK},
    )  # fmt: skip


def looping() -> Call:
    return Call(
        remembering(sf.export.onnx_loop),
        {
            "model": Small(), "path": target(".onnx"), "steps": 2, "eta": 0.5,
            "schedule": SCHEDULE, "prediction_type": "epsilon", "example_inputs": inputs(),
            "verify": False, "batch": 2,
        },
        {
            "path": {"a text"}, "eta": {"0"}, "steps_offset": {"0"},
            "clip_sample": {"1.5", "2 ** 70"},
            "timesteps": {"as an iterator"}, "example_inputs": {"as a list"},
            "verify": {"True"}, "batch": {"a numpy integer"},
        },
        named={"path": PATH},
        instead={
            "timesteps": [9, 5, 1], "clip_sample": 1.0, "steps_offset": 1,
            "guidance": sf.CFG(2.0, {"labels": torch.tensor([3])}),
        },
        undefined={"example_inputs": UNKNOWN_NETWORK},
    )  # fmt: skip


def checking() -> Call:
    def candidate(x: Any, t: Any, labels: Any) -> Any:
        return Small()(x, t, labels)

    return Call(
        sf.export.check,
        {
            "reference": Small(), "candidate": candidate, "example_inputs": inputs(),
            "schedule": SCHEDULE, "prediction_type": "epsilon", "steps": 2, "bins": 2,
            "images": 2, "batch": 2, "precision": "fp32", "tolerance": 0.5,
        },
        {
            "example_inputs": {"as a list"}, "tolerance": {"1.5", "2 ** 70"}, "seed": {"-1", "0"},
            "clip_sample": {"1.5", "2 ** 70"},
        },
        named={"candidate": PATH},
        instead={"sample_shape": (2, 6, 6), "clip_sample": 1.0, "seed": 3},
        undefined={"example_inputs": UNKNOWN_NETWORK, "schedule": UNKNOWN_NETWORK},
    )  # fmt: skip


def building() -> Call:
    small = save_graph(target(".onnx"), ["Relu"])
    return Call(
        sf.export.tensorrt,
        {
            "onnx_path": small, "engine_path": target(".engine"), "library": "tensorrt_rtx",
            "batch": 2,
        },
        {"engine_path": {"a text"}, "timing_cache": {"a text"}},
        named={"onnx_path": PATH, "engine_path": PATH, "timing_cache": PATH},
        instead={"workspace": 2**30, "timing_cache": target(".cache"), "precision": "fp32"},
    )  # fmt: skip


def engine(**options: Any) -> Any:
    """`TensorRTDenoiser` with a library made of PyTorch, on the CPU."""
    with (
        mock.patch.object(tensorrt_runtime, "find_library", return_value=FAKE),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(tensorrt_runtime, "_stream", return_value=STREAM),
        mock.patch.object(tensorrt_runtime.TensorRTDenoiser, "_buffer", _buffer),
    ):
        return sf.TensorRTDenoiser(**options)


def _buffer(denoiser: Any, spec: Any) -> Any:
    shape = (denoiser.info.batch.maximum, *spec.shape[1:])
    return torch.empty(shape, dtype=getattr(torch, spec.dtype))


def engine_file() -> Path:
    path = target(".engine")
    write_engine(path, info(), b"plan")
    return path


def running_engine() -> Call:
    denoiser = engine(path=engine_file())
    denoiser.device = torch.device("cpu")

    def forward(**arguments: Any) -> Any:
        with mock.patch.object(tensorrt_runtime, "_stream", return_value=STREAM):
            return denoiser(**arguments)

    x, t, labels = engine_inputs(2)
    return Call(
        forward,
        {"x": x, "t": t, "labels": labels},
        {
            "x": {"as integers", "as truth values"},
            "t": {"as fractions", "as truth values"},
            "labels": {"None", "as fractions", "as truth values"},
        },
        named={"x": ("batch",)},
        undefined=dict.fromkeys(("x", "t", "labels"), FAKE_TENSORS),
    )


def running_onnx() -> Call:
    denoiser = sf.OnnxDenoiser(exported())
    x, t, named = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), {"labels": torch.tensor([1, 2])}
    return Call(
        denoiser.forward,
        {"x": x, "t": t, **named},
        {"labels": {"None"}},
        named={"x": ("batch",)},
        undefined=dict.fromkeys(("x", "t", "labels"), FAKE_TENSORS),
    )


def asking(denoiser: Any) -> Call:
    """Whether labels are classes; how many there are is not asked."""
    shapes = {
        "of one axis more",
        "without its first axis",
        "of twice the entries",
        "without entries",
    }
    return Call(denoiser.check_labels, {"labels": torch.tensor([1, 2])}, {"labels": shapes})


CALLS = {
    "export.onnx": exporting,
    "export.onnx_loop": looping,
    "export.check": checking,
    "export.tensorrt": building,
    "export.read_metadata": lambda: Call(
        sf.export.read_metadata, {"path": exported()}, named={"path": PATH}
    ),
    "export.Metadata.from_strings": lambda: Call(
        sf.export.Metadata.from_strings, {"strings": sf.export.Metadata().to_strings()}
    ),
    "export.Metadata.to_strings": lambda: Call(sf.export.Metadata().to_strings, {}),
    "export.Tolerance": lambda: Call(
        sf.export.Tolerance,
        {"relative_l2": 0.1, "psnr": 30.0},
        {"relative_l2": {"1.5", "2 ** 70"}, "psnr": {"1.5", "-1", "0", "2 ** 70"}},
    ),
    "OnnxDenoiser": lambda: Call(
        sf.OnnxDenoiser,
        {"path": exported(), "threads": 1, "providers": ["CPUExecutionProvider"]},
        named={"path": PATH, "providers": ("provider",)},
    ),
    "OnnxDenoiser.check_labels": lambda: asking(sf.OnnxDenoiser(exported())),
    "OnnxDenoiser.forward": running_onnx,
    "TensorRTDenoiser": lambda: Call(
        engine, {"path": engine_file(), "device": "cuda", "results": 2}, named={"path": PATH}
    ),
    "TensorRTDenoiser.forward": running_engine,
}
