"""What every command that runs a network is given: a model and a device, by their names."""

from __future__ import annotations

import torch

from stepfuse.engine.cli.errors import Problem
from stepfuse.engine.generate.crew import DeviceMissing, resolve_device
from stepfuse.engine.networks.checkpoint import Checkpoint, load


def load_model(name: str) -> Checkpoint:
    """The checkpoint; an unknown name and a bad file are values that are not accepted."""
    return load(name)


def choose_device(name: str) -> torch.device:
    """The device of that name, or the best there is for "auto"."""
    try:
        return torch.device(resolve_device(name))
    except DeviceMissing as error:
        raise Problem(str(error)) from error
