"""Channels-last images side by side by the C++ module; the contract is that of the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.kernels.cpp.module import native, threads


def run(images: Sequence[Tensor], out: Tensor) -> None:
    """Write the images side by side into ``out``, which is channels-last."""
    parts = [image.contiguous(memory_format=torch.channels_last) for image in images]
    n, _, h, w = out.shape
    size = out.element_size()
    rows = [(part.data_ptr(), part.shape[1] * size) for part in parts]
    native.concatenate(rows, out.data_ptr(), n * h * w, threads())
