"""A small network whose weights are parked, and questions about where they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepfuse.engine.compile.weights.parked import Files

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
REORDERED = 1e-5  # float32 sums in another order, through three layers
PAGE = 4096


def network() -> tuple[nn.Module, Tensor]:
    """Three convolutions with norms between them, and an image of an odd shape."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
    model = nn.Sequential(layers[0], nn.GroupNorm(4, 64), nn.SiLU(), *layers[1:]).eval()
    return model, torch.randn(2, 64, 7, 5)


def weights(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() == 4]


def in_file(model: nn.Module) -> list[bool]:
    files = Files()
    return [weight in files for weight in weights(model)]


def resident(weight: Tensor) -> int:
    """Bytes of the mapping around ``weight`` that are in memory."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            here = start <= weight.data_ptr() < end
        elif here and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("it is in no mapping")
