"""Sample grids during training."""

from __future__ import annotations

from pathlib import Path

import torch

from stepfuse.engine.files.images import grid, save_png, to_pixels
from stepfuse.engine.networks.checkpoint import Checkpoint

COLUMNS, ROWS, STEPS = 10, 4, 25


def save_preview(path: Path, made: Checkpoint, seed: int) -> None:
    """Write a PNG grid of samples, in the checkpoint's own way or by 25 steps where that has more.

    Class k is in column k mod 10.
    """
    condition = None
    if made.num_classes is not None:
        column = torch.arange(COLUMNS * ROWS) % COLUMNS
        condition = {"labels": column % made.num_classes}
    own = made.sampling.steps
    fewer = {} if isinstance(own, int) and own <= STEPS else {"steps": STEPS}
    total = made.schedule.num_train_timesteps
    sampler = made.sampler(**{n: min(steps, total) for n, steps in fewer.items()})
    x = sampler.sample(shape=(COLUMNS * ROWS, *made.sample_shape), seed=seed, condition=condition)
    images = made.decode(x)
    shown = images[:, :3] if made.sample_shape[0] >= 3 else images[:, :1]
    save_png(path, grid(to_pixels(shown, low=0), COLUMNS))
