"""What every command that runs a network is given: a model and a device, by their names."""

from __future__ import annotations

import torch

from stepfuse.engine.cli.errors import Problem
from stepfuse.engine.networks.checkpoint import Checkpoint, load


def load_model(name: str) -> Checkpoint:
    """The checkpoint; an unknown name and a bad file are values that are not accepted."""
    return load(name)


def choose_device(name: str) -> torch.device:
    """The device of that name, or the best there is for "auto"."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Problem(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; "
            "`stepfuse doctor` says more"
        )
    return device
