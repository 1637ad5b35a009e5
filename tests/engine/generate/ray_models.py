"""Networks for jobs that Ray makes: slow enough to be killed in the middle, or bad on purpose."""

from __future__ import annotations

import errno
import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.sampling.schedule import Schedule

SECONDS = 0.1  # of a slow call
GOOD, RAISES, DIES = "good", "raises", "dies"


def quick() -> Any:
    """Takes no time."""
    return _trained(lambda x, t: torch.tanh(0.5 * x))


def slow() -> Any:
    """Takes `SECONDS` a call."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(SECONDS if float(x.abs().max()) >= 0 else 0)  # cannot be captured and replayed
        return torch.tanh(0.5 * x)

    return _trained(model)


def full() -> Any:
    """Finds no room on a disk."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    return _trained(model)


def poisonous() -> Any:
    """Raises for images of the second class, and ends its process for those of the third."""

    def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if bool((labels == 1).any()):
            raise ArithmeticError("poison")
        if bool((labels == 2).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tanh(0.5 * x)

    return _trained(model, (GOOD, RAISES, DIES))


def _trained(model: Any, labels: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(
        model=model,
        schedule=Schedule.linear(),
        prediction_type="epsilon",
        sample_shape=(1, 8, 8),
        labels=labels,
    )
