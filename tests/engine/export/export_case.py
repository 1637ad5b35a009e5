"""One tiny network, exported once per precision for all the tests of export."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import stepfuse as sf
from stepfuse.engine.networks.checkpoint import save
from stepfuse.engine.networks.unet import UNet, UNetConfig

SIDE, CLASSES = 8, 3
SHAPE = (1, SIDE, SIDE)
SCHEDULE = sf.Schedule.linear(100)
CONFIG = replace(
    UNetConfig.digits(),
    base_channels=8,
    norm_groups=4,
    channel_multipliers=(1,),
    attention_factors=(),
    num_classes=CLASSES,
)
BATCH = "1:2:4"


@functools.cache
def network() -> UNet:
    """Untrained, with no layer at zero; the same whichever test asks first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(CONFIG).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def exported(precision: str = "fp32") -> Path:
    """The network as an ONNX file; skips where the packages are missing."""
    return _exported(precision)


@functools.cache
def checkpoint() -> str:
    """The network as a checkpoint file."""
    path = Path(folder.name) / "tiny.safetensors"
    save(
        path,
        network(),
        SCHEDULE,
        sample_shape=SHAPE,
        labels=[str(n) for n in range(CLASSES)],
        dtype=torch.float32,
    )
    return str(path)


@functools.cache
def _exported(precision: str) -> Path:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    path = Path(folder.name) / f"{precision}.onnx"
    sf.export.onnx(
        network(),
        path,
        sample_shape=SHAPE,
        schedule=SCHEDULE,
        prediction_type="epsilon",
        precision=precision,
        batch=BATCH,
        verify=False,
    )
    return path


# goes with the process
folder = tempfile.TemporaryDirectory(prefix="stepfuse-tests-")


def altered(source: Path, target: Path, weight: str, change: float) -> Path:
    """A copy of an ONNX file in which one weight has one entry in three changed."""
    import onnx

    model = onnx.load(source)
    (tensor,) = [t for t in model.graph.initializer if t.name == weight]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[::3] += np.asarray(change, dtype=values.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)
    return target
