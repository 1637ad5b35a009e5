"""How the numbers that a network works on become images: channel by channel, mean + std x."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels.arguments import as_list, check_floats
from stepfuse.kernels.checks import as_number


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of every channel of the training images, pixels in [0, 1].

        x = (pixel - mean) / std          pixel = clamp(mean + std x, 0, 1)

    Raises TypeError or ValueError for numbers that are not finite, of differing counts, or a
    standard deviation that is not positive: constant data cannot be normalised.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = as_list(name, getattr(self, name), "a list of numbers, one for each channel")
            object.__setattr__(self, name, tuple(as_number(name, value) for value in values))
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                "mean and std must have one number for each channel; got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        for channel, value in enumerate(self.std):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"std must be positive in every channel; got {value} in channel {channel}, "
                    "whose pixels are all alike"
                )

    def decode(self, x: Tensor) -> Tensor:
        """Images in [0, 1] of normalised ones, [N, C, H, W]."""
        mean, std = self._columns("x", x)
        return (mean + std * x).clamp(0, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised images of those in [0, 1], [N, C, H, W]."""
        mean, std = self._columns("pixels", pixels)
        return (pixels - mean) / std

    def to_json(self) -> dict[str, list[float]]:
        """As a checkpoint keeps it."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: Any, channels: int) -> Normalization:
        """The inverse; ValueError for what is none of so many channels."""
        known = isinstance(values, dict) and values.keys() == {"mean", "std"}
        if not known or not all(
            isinstance(v, list) and len(v) == channels for v in values.values()
        ):
            raise ValueError(
                f"normalization is {str(values)[:60]!r}; accepted: mean and std, {channels} "
                "numbers each"
            )
        return cls(tuple(values["mean"]), tuple(values["std"]))

    def _columns(self, name: str, x: Tensor) -> list[Tensor]:
        _check_images(name, x, len(self.mean))
        numbers = torch.tensor([self.mean, self.std], dtype=x.dtype, device=x.device)
        return list(numbers.view(2, -1, 1, 1).unbind())


def decoded(x: Tensor, normalization: Normalization | None, channels: int) -> Tensor:
    """Images in [0, 1] of a network's samples [N, C, H, W]; (x + 1) / 2 where nothing else is said.

    Float32 or float64; NaN stays NaN. Raises TypeError or ValueError for what are no samples.
    """
    _check_images("x", x, channels)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalization is not None:
        return normalization.decode(x)
    return ((x + 1) / 2).clamp(0, 1)


def _check_images(name: str, x: Tensor, channels: int) -> None:
    check_floats(name, x)
    if x.dim() != 4 or not x.numel() or channels != x.shape[1]:
        raise ValueError(f"{name} must be [N, {channels}, H, W]; got shape {tuple(x.shape)}")
