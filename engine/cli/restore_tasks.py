"""``stepfuse restore``: its tasks as operators, and what they measured as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stepfuse.engine.cli.restore_options import RestoreOptions
from stepfuse.engine.sampling.inverse.blur import Blur
from stepfuse.engine.sampling.inverse.operator import Operator
from stepfuse.engine.sampling.inverse.pixels import Downsample, Mask, Outpaint
from stepfuse.engine.sampling.inverse.radon import Radon
from stepfuse.engine.training.pictures import read_picture

BOX = 7 / 16  # of the side: the hole of a demo
UNKNOWN = -0.5  # grey, where nothing was measured
Shape = tuple[int, int, int]


def operator_of(options: RestoreOptions, shape: Shape) -> Operator:
    """A of the task, for images of ``shape``."""
    if options.task == "inpaint":
        return Mask(_mask(options, shape))
    if options.task == "outpaint":
        return Outpaint(min(shape[1:]) // 4 if options.pad is None else options.pad)
    if options.task == "sr":
        return Downsample(4 if options.factor is None else options.factor)
    if options.task == "blur":
        return Blur(2.0 if options.sigma is None else options.sigma)
    return Radon(12 if options.angles is None else options.angles, normalize=True)


def _mask(options: RestoreOptions, shape: Shape) -> Tensor:
    """1 where it is measured, [1, H, W]."""
    _, height, width = shape
    if options.mask is None:
        mask = torch.ones(1, height, width)
        tall, wide = round(BOX * height), round(BOX * width)
        top, left = (height - tall) // 2, (width - wide) // 2
        mask[:, top : top + tall, left : left + wide] = 0
        return mask
    levels = read_levels(options.mask)
    _check_size(options.mask, levels, (levels.shape[0], height, width))
    return (levels < 0.5).all(0, keepdim=True).float()


def read_levels(path: Path) -> Tensor:
    """A picture as float32 [C, H, W] in [0, 1]."""
    pixels = read_picture(path).pixels
    most = np.iinfo(pixels.dtype).max
    return torch.from_numpy(pixels.astype(np.float32) / most).movedim(-1, 0)


def read_image(path: Path, shape: Shape) -> Tensor:
    """An image of the model's own shape, in [-1, 1]: [1, C, H, W]."""
    levels = read_levels(path)
    _check_size(path, levels, shape)
    return 2 * levels[None] - 1


def read_measurement(a: Operator, path: Path, shape: Shape) -> Tensor:
    """y of a picture, [1, ...], for images x in [-1, 1]."""
    levels = read_levels(path)
    ones = a(torch.ones(1, *shape))
    _check_size(path, levels, tuple(ones.shape[1:]))
    if isinstance(a, Radon):
        # of p = sums of (x + 1) / 2, white being the side; A is that, divided by its norm
        side = shape[1]
        norm = side * side / ones[..., 0, :].sum(-1).mean()
        return 2 * side / norm * levels[None] - ones
    # a constant c is measured as c, but where nothing is
    return (2 * levels[None] - 1) * ones


def shown(a: Operator, y: Tensor, shape: Shape) -> Tensor:
    """y as images of the model's size in [-1, 1], [N, C, H, W]; grey where nothing was measured."""
    if isinstance(a, Radon):
        low, high = y.amin((1, 2, 3), keepdim=True), y.amax((1, 2, 3), keepdim=True)
        scaled = 2 * (y - low) / (high - low).clamp_min(1e-12) - 1
        return functional.interpolate(scaled, size=shape[1:], mode="nearest")
    if isinstance(a, (Mask, Outpaint)):
        known = a.adjoint(a(torch.ones(1, *shape)))
        return a.adjoint(y) + UNKNOWN * (1 - known)
    return a.pinv(y) if isinstance(a, Downsample) else y


def _check_size(path: Path, levels: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(levels.shape) != wanted:
        raise ValueError(f"{path} is {_said(tuple(levels.shape))}; accepted here: {_said(wanted)}")


def _said(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
