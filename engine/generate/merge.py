"""All shards of a job as one npz file for the evaluators of guided-diffusion."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from stepfuse.engine.files.images import check_channels
from stepfuse.engine.files.writing import write_file
from stepfuse.engine.generate.formats.format import Format, Shape, decoded
from stepfuse.engine.generate.formats.npz import CHANNELS, pieces

Shard = tuple[Path, int, int]  # the file or folder, its first image, how many


def merge_npz(
    shards: Iterable[Shard],
    format: Format,
    shape: Shape,
    out: str | os.PathLike[str],
    labels: bool,
) -> None:
    """Write arr_0, uint8 [N, H, W, 3], and with ``labels`` arr_1, int64 [N], into ``out``.

    Row r is the r-th image of the shards; -1 is the label of an image that has none. One image at
    a time is in memory, whatever N is: shards are read once for the images and, with ``labels``,
    once more for those. ``out`` appears whole or not at all.

    Args:
        shards: in the order of their images, each beginning where the one before it ends.
        format: in which they are written.
        shape: (C, H, W) of the images, C being 1 (grey, which is repeated) or 3.
        out: replaced where it exists.

    Raises ValueError for samples instead of pixels, and where a shard is damaged or holds other
    images than it should: file and image are named.
    """
    shards = list(shards)
    if format.takes != "pixels":
        raise ValueError(f"format {format.name} holds samples; only pixels can be merged")
    check_channels(shape[0])
    _check_order(shards)
    total = sum(count for _, _, count in shards)
    write_file(
        out,
        pieces(
            (total, *shape[1:]),
            _images(shards, format, shape),
            (lambda: _labels(shards, format)) if labels else None,
        ),
    )


def _check_order(shards: Sequence[Shard]) -> None:
    if not shards:
        raise ValueError("there must be at least 1 shard to merge; got none")
    for (_, first, count), (path, following, _) in pairwise(shards):
        if first + count != following:
            raise ValueError(
                f"{path} begins with image {following}; expected image {first + count}"
            )


def _images(shards: Sequence[Shard], format: Format, shape: Shape) -> Iterator[bytes]:
    for path, first, count in shards:
        for _, pixels in decoded(format, path, first, count, shape):
            yield np.broadcast_to(pixels, (*shape[1:], CHANNELS)).tobytes()


def _labels(shards: Sequence[Shard], format: Format) -> Iterator[int]:
    for path, first, count in shards:
        seen = 0
        for label in islice(format.labels(path, first), count + 1):
            seen += 1
            yield label
        if seen != count:
            found = f"more than {count}" if seen > count else str(seen)
            raise ValueError(f"{path}: {count} images have a label; got {found} labels")
