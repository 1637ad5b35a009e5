"""The embedded checkpoint on the device of a check, in arithmetic that can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import stepfuse as sf

CLASSES = 10


def comparable() -> None:
    """From now on float32 is float32 on CUDA, and a convolution gives the same bits every time."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


class Digits:
    """The network of the digits, its schedule, and what to ask of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.checkpoint = sf.load("digits")
        self.model = self.checkpoint.model.to(device)
        self.schedule = self.checkpoint.schedule

    def shape(self, count: int) -> tuple[int, ...]:
        """Of ``count`` images."""
        return (count, *self.checkpoint.sample_shape)

    def condition(self, count: int) -> dict[str, Tensor]:
        """The digits 0, 1, ..., 9, 0, ... in turn."""
        return {"labels": torch.arange(count, device=self.device) % CLASSES}

    def sampler(self, model: Any = None, **settings: Any) -> sf.Sampler:
        """Of this network, or of ``model`` in its place."""
        return sf.Sampler(self.model if model is None else model, self.schedule, **settings)

    def draw(self, sampler: sf.Sampler, count: int, **call: Any) -> Tensor:
        """``count`` images."""
        return sampler.sample(self.shape(count), condition=self.condition(count), **call)


def guidance() -> sf.CFG:
    """Against the network without a label."""
    return sf.CFG(2.0, unconditional={"labels": None})


def largest(found: Tensor, other: Tensor) -> float:
    """The largest difference; NaN where there is a NaN."""
    return float((found.double().cpu() - other.double().cpu()).abs().max())
