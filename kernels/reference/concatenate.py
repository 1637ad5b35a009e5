"""Images side by side in their channels, as written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def run(images: Sequence[Tensor], out: Tensor) -> None:
    """Write the images [N, C_i, H, W] into ``out`` [N, sum C_i, H, W], one after the other."""
    first = 0
    for image in images:
        last = first + image.shape[1]
        out[:, first:last] = image
        first = last
