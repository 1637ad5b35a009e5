"""What the valid calls of the table are made with: all of it small, made once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tests.engine.cli.cli_case import TINY, save
from torch import Tensor, nn

import stepfuse as sf

TRAINED, SHAPE = 40, (2, 1, 4, 4)
folder = tempfile.TemporaryDirectory(prefix="stepfuse-tests-")  # goes with the process


class Net(nn.Module):
    """(x, t, labels) -> like x, with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(x)
        return y if labels is None else y + labels.view(-1, 1, 1, 1)


@functools.cache
def schedule() -> sf.Schedule:
    """A short one."""
    return sf.Schedule.linear(TRAINED)


@functools.cache
def net() -> Net:
    """The same network for all."""
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def sampler() -> sf.Sampler:
    """Two steps, nothing captured."""
    return sf.Sampler(net(), schedule(), steps=2, graph=None)


@functools.cache
def images() -> Tensor:
    """[2, 1, 4, 4] in [-1, 1]."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@functools.cache
def checkpoint_file() -> Path:
    """A checkpoint of a tiny U-Net."""
    return Path(save(Path(folder.name) / "tiny.safetensors", TINY))


@functools.cache
def checkpoint() -> sf.Checkpoint:
    """The same, loaded."""
    return sf.load(checkpoint_file())
