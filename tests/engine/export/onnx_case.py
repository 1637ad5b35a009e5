"""A network that exports in a second, and what tests of ONNX files look up."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.export.to_onnx.graph import build
from stepfuse.engine.networks.unet_blocks import GroupNormSiLU

CHANNELS, SIDE, CLASSES = 2, 6, 3
LARGE = 6  # the batch from which `Small.branch` is taken
SCHEDULE = sf.Schedule.cosine(40)


class Small(nn.Module):
    """(x, t, labels) -> like x, or 2C channels: convolutions and every form of the fused norm."""

    def __init__(self, out: int = CHANNELS, branch: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.table = nn.Embedding(CLASSES + 1, 12)
        self.conv_in = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.norm1 = GroupNormSiLU(4, 2, 1e-5)
        self.dropout = nn.Dropout(0.5)
        self.norm2 = GroupNormSiLU(4, 2, 1e-5, act="none")
        self.conv_out = nn.Conv2d(4, out, 3, padding=1)
        self.branch = branch
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, strength: float = 1.0) -> Tensor:
        angle = t.to(x.dtype)[:, None] / 40
        scale, shift, add = (self.table(labels) * strength + angle).chunk(3, dim=1)
        h = self.dropout(self.norm1(self.conv_in(x), add=add))
        if self.branch is not None and x.shape[0] >= LARGE:
            h = self.branch(h)
        y: Tensor = self.conv_out(self.norm2(h, scale=scale, shift=shift))
        return y


def inputs(count: int = 1, side: int = SIDE) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t and labels for ``count`` samples, no two alike."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, CHANNELS, side, side, generator=generator)
    t = (torch.arange(count) * 17 + 5) % 40
    return x, t, {"labels": torch.arange(count) % (CLASSES + 1)}


def export(path: Path, model: nn.Module | None = None, **options: Any) -> Any:
    """`sf.export.onnx` of a `Small`, for batches 1 .. 4."""
    settings: dict[str, Any] = {"example_inputs": inputs(), "batch": "1:2:4", "verify": False}
    return sf.export.onnx(Small() if model is None else model, path, **{**settings, **options})


def run(path: Path, feed: dict[str, Tensor]) -> Tensor:
    """What ONNX Runtime makes of a file, without this project's code."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {name: value.numpy() for name, value in feed.items()})
    return torch.from_numpy(result)


_graphs: dict[Any, tuple[Any, dict[str, Any]]] = {}


def build_once(network: Any, source: Any, batch: Any, opset: int, sizes: bool) -> Any:
    """`onnx_graph.build`, remembered: a new model of the same graph each time."""
    import onnx_ir

    key = (source.model, network.precision, str(batch), opset, sizes)
    if key not in _graphs:
        model = build(network, source, batch, opset, sizes)
        _graphs[key] = onnx_ir.to_proto(model), dict(model.meta)
    proto, meta = _graphs[key]
    model = onnx_ir.from_proto(proto)
    model.meta.update(meta)
    return model


def expected(model: nn.Module, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """In float64, on a copy, dropout off."""
    double = deepcopy(model).double().eval()
    with torch.no_grad():
        y: Tensor = double(x.double(), t, **condition)
    return y
