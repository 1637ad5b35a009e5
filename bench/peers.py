"""The runtimes a U-Net is compared with: how to build each, or why it cannot run here.

A peer takes an eager float32 module ``model(x, t)`` whose result is a tensor and returns a callable
of the same arguments and result. What a peer needs once (conversion, compilation, packing) happens
in its ``build``; whether weights are folded, threads and precision are set as its manual advises.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepfuse.kernels import torch_names

Call = Callable[[Tensor, Tensor], Tensor]
Build = Callable[[nn.Module, Tensor, Tensor], Call]


@dataclass(frozen=True)
class Peer:
    """One runtime in one precision; ``needs`` are the packages it imports."""

    name: str
    dtype: str
    build: Build
    needs: tuple[str, ...] = ()

    def why_not(self) -> str:
        """The reason it cannot run here; empty where it can."""
        for package in self.needs:
            try:
                importlib.import_module(package)
            except ImportError as error:
                return f"{package} is not there ({error}); `pip install {package}`"
        return ""


def eager(model: nn.Module, x: Tensor, t: Tensor) -> Call:
    """The module as it is."""
    return model


def eager_bfloat16(model: nn.Module, x: Tensor, t: Tensor) -> Call:
    """Weights, activations and x in bfloat16, channels-last."""
    low = copied(model, torch.bfloat16)

    def call(x: Tensor, t: Tensor) -> Tensor:
        image = x.to(torch.bfloat16, memory_format=torch.channels_last)
        result: Tensor = low(image, t).to(torch.float32)
        return result

    return call


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model with its weights in ``dtype`` and channels-last."""
    with warnings.catch_warnings(), _quiet("diffusers"):
        warnings.simplefilter("ignore")
        return copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)


def inductor(model: nn.Module, x: Tensor, t: Tensor) -> Call:
    """torch.compile with its weights frozen and packed."""
    return _compiled(model, x, t)


def inductor_bfloat16(model: nn.Module, x: Tensor, t: Tensor) -> Call:
    """The same under autocast: oneDNN in bfloat16."""
    compiled = _compiled(model, x, t, torch.bfloat16)

    def call(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = compiled(x, t).to(torch.float32)
        return result

    return call


def _compiled(model: nn.Module, x: Tensor, t: Tensor, dtype: torch.dtype | None = None) -> Call:
    inductor_config = torch_names.find("torch._inductor", "config")
    inductor_config.freezing = True
    try:
        frozen = copy.deepcopy(model).eval()
        compiled: Any = torch.compile(frozen, dynamic=False)
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype or torch.bfloat16, enabled=bool(dtype)),
            compiling_quietly(),
        ):
            compiled(x, t)
    finally:
        inductor_config.freezing = False
    call: Call = compiled
    return call


@contextlib.contextmanager
def compiling_quietly() -> Iterator[None]:
    """Inside, torch.compile says nothing and compiles every network it is given.

    Networks share the code of their forward, and each counts as a recompilation of it; a reset
    would throw away those that were compiled, and at the limit it runs eagerly.
    """
    dynamo_config = torch_names.find("torch._dynamo", "config")
    limit = "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"
    fail = f"fail_on_{limit.replace('_size', '')}_hit"
    with (
        dynamo_config.patch({limit: 64, fail: True}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def onnxruntime(model: nn.Module, x: Tensor, t: Tensor) -> Call:
    """ONNX Runtime's CPU provider with all graph optimisations."""
    runtime = importlib.import_module("onnxruntime")
    with _exported(model, x, t) as path:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # threads that spin after a run would take the processors from the next candidate
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = runtime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def call(x: Tensor, t: Tensor) -> Tensor:
        feed = dict(zip(names, (x.numpy(), t.numpy()), strict=True))
        return torch.from_numpy(session.run(None, feed)[0])

    return call


def openvino(model: nn.Module, x: Tensor, t: Tensor) -> Call:
    """OpenVINO in float32, tuned for latency."""
    return _openvino(model, x, t, "f32")


def openvino_bfloat16(model: nn.Module, x: Tensor, t: Tensor) -> Call:
    """OpenVINO with bfloat16 as its inference precision."""
    return _openvino(model, x, t, "bf16")


def _openvino(model: nn.Module, x: Tensor, t: Tensor, precision: str) -> Call:
    library = importlib.import_module("openvino")
    with _exported(model, x, t) as path:
        network = library.Core().read_model(str(path))
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = library.Core().compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()

    def call(x: Tensor, t: Tensor) -> Tensor:
        found = request.infer([x.numpy(), t.numpy()], share_inputs=True)
        return torch.from_numpy(np.array(found[compiled.output(0)]))

    return call


@contextlib.contextmanager
def _exported(model: nn.Module, x: Tensor, t: Tensor) -> Iterator[Path]:
    """An ONNX file of the model, for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(Path(os.devnull).open("w")),
            _quiet("torch.onnx", "onnxscript", "torch"),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x, t), path, dynamo=True, external_data=False, verbose=False)
        yield path


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


PEERS = (
    Peer("eager", "fp32", eager),
    Peer("eager-bf16", "bf16", eager_bfloat16),
    Peer("inductor", "fp32", inductor),
    Peer("inductor-bf16", "bf16", inductor_bfloat16),
    Peer("onnxruntime", "fp32", onnxruntime, ("onnxruntime", "onnx", "onnxscript")),
    Peer("openvino", "fp32", openvino, ("openvino", "onnx", "onnxscript")),
    Peer("openvino-bf16", "bf16", openvino_bfloat16, ("openvino", "onnx", "onnxscript")),
)
