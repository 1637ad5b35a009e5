"""Sample grids during training."""

from __future__ import annotations

from pathlib import Path

import torch

from stepfuse.engine.files.images import grid, save_png, to_pixels
from stepfuse.engine.networks.unet import UNet
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.training.config import TrainConfig

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
    shown = x0[:, :3] if sample_shape[0] >= 3 else x0[:, :1]
    save_png(path, grid(to_pixels(shown), COLUMNS))
