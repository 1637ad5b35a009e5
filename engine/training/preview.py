"""Sample grids during training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepfuse.engine.checkpoint import whole_file
from stepfuse.engine.sampler import Sampler
from stepfuse.engine.training.config import TrainConfig
from stepfuse.engine.unet import UNet

COLUMNS, ROWS, STEPS = 10, 4, 25


def save_preview(
    path: Path, model: UNet, config: TrainConfig, sample_shape: tuple[int, int, int]
) -> None:
    """Write a PNG grid of DDIM samples (25 steps, eta 0); class k in column k mod 10."""
    condition = None
    if model.config.num_classes is not None:
        column = torch.arange(COLUMNS * ROWS) % COLUMNS
        condition = {"labels": (column % model.config.num_classes).to(config.device)}
    sampler = Sampler(
        model,
        config.schedule,
        steps=min(STEPS, config.schedule.num_train_timesteps),
        prediction_type=config.prediction_type,
        variance_type="learned_range" if model.config.learned_variance else "fixed_small",
    )
    x0 = sampler.sample(
        shape=(COLUMNS * ROWS, *sample_shape), seed=config.seed, condition=condition
    )
    save_grid(path, x0, COLUMNS)


def save_grid(path: Path, x0: Tensor, columns: int) -> None:
    """Write images [N, C, H, W] in [-1, 1] as PNG: in colour from three channels on, else grey."""
    from PIL import Image

    pixels = ((x0.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = np.zeros((rows * columns, channels, height, width), dtype=np.uint8)
    canvas[:count] = pixels
    grid = canvas.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    image = grid.reshape(rows * height, columns * width, channels)
    with whole_file(path) as file:
        Image.fromarray(image.squeeze(2) if channels == 1 else image).save(file, format="PNG")
