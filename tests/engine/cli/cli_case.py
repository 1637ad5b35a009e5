"""Tiny networks for the command line, and short ways to call it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stepfuse as sf
from stepfuse.engine.cli import run
from stepfuse.engine.networks import checkpoint
from stepfuse.engine.networks.unet import UNet, UNetConfig

SIDE = 8
LABELS = ("circle", "square", "7")
TINY = replace(
    UNetConfig.digits(),
    base_channels=8,
    norm_groups=4,
    channel_multipliers=(1, 2),
    attention_factors=(),
    num_classes=len(LABELS),
)


def save(path: Path, config: UNetConfig) -> str:
    """Write an untrained network whose output is not zero; its path."""
    torch.manual_seed(0)
    model = UNet(config)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    checkpoint.save(
        path,
        model,
        sf.Schedule.linear(100),
        sample_shape=(config.in_channels, SIDE, SIDE),
        labels=LABELS[: config.num_classes or 0],
    )
    return str(path)


def sample(model: str, *options: str) -> int:
    """`stepfuse sample` with two steps, in this process; its exit status."""
    return run(["sample", "--model", model, "--steps", "2", *options])


def arrays(path: str) -> dict[str, Any]:
    """What an .npz file holds."""
    with np.load(path, allow_pickle=False) as read:
        return dict(read)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m stepfuse` in a process of its own."""
    command = [sys.executable, "-m", "stepfuse", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
