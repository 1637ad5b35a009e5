"""Networks for jobs: small, and some of them with a fault at one class."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import stepfuse as sf

SHAPE = (1, 8, 8)
FAULTY = 2  # the class that faults are about


class Net(nn.Module):
    """Predicts epsilon by one convolution, a shift for each class; not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(1, 1, 3, 3, generator=generator) * 0.3)
            self.conv.bias.zero_()  # type: ignore[union-attr]
        self.register_buffer("shift", torch.linspace(-0.2, 0.2, 4))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """[N, 1, 8, 8] to the same."""
        shift: Any = self.shift
        classes = torch.full_like(t, 3) if labels is None else labels
        return self.conv(x) + shift[classes][:, None, None, None] + t[:, None, None, None] * 1e-3


class Poison(Net):
    """Raises where an image of class `FAULTY` is in the batch."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `Net`."""
        if labels is not None and bool((labels == FAULTY).any()):
            raise RuntimeError("this image cannot be made")
        return super().forward(x, t, labels)


class Killer(Net):
    """Kills its process there."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `Net`."""
        if labels is not None and bool((labels == FAULTY).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, t, labels)


class Slow(Net):
    """Takes its time."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `Net`."""
        time.sleep(0.02)
        return super().forward(x, t, labels)


@dataclass
class Toy:
    """What a function that is named as a model returns."""

    model: nn.Module
    schedule: sf.Schedule = field(default_factory=lambda: sf.Schedule.linear(100))
    prediction_type: str = "epsilon"
    sample_shape: tuple[int, int, int] = SHAPE
    labels: tuple[str, ...] = ("circle", "square", "7")


def plain() -> Toy:
    """Works."""
    return Toy(Net().eval())


def poison() -> Toy:
    """Raises at class 2."""
    return Toy(Poison().eval())


def killer() -> Toy:
    """Dies at class 2."""
    return Toy(Killer().eval())


def slow() -> Toy:
    """20 ms an evaluation."""
    return Toy(Slow().eval())
