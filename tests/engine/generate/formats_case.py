"""Images to be written, and the formats that write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepfuse.engine.generate.formats import Format, choose
from stepfuse.engine.generate.formats.format import Shape
from stepfuse.engine.generate.made import Made

# what `choose` takes; each is a format of its own
CHOICES: dict[str, dict[str, Any]] = {
    "webdataset": {},
    "webdataset-webp": {"image": "webp"},
    "webdataset-jpeg": {"image": "jpeg", "quality": 90},
    "npz": {},
    "png": {"level": 1},
    "webp": {},
    "jpeg": {},
    "parquet": {},
    "parquet-webp": {"image": "webp", "level": 2},
    "npy": {},
}
PIXELS = [choice for choice in CHOICES if choice != "npy"]
EXACT = [choice for choice in CHOICES if "jpeg" not in choice]
SHAPES = [(1, 1, 1), (1, 7, 13), (3, 1, 5), (3, 17, 8)]
FIRST = 999_999_999_998  # names have a thirteenth digit from the third image on


def chosen(choice: str) -> Format:
    """The format of that name. The test is skipped where it needs a library that is not there."""
    name = choice.split("-")[0]
    if name == "parquet":
        pytest.importorskip("pyarrow.parquet", reason="format parquet needs pyarrow")
    return choose(name, **CHOICES[choice])


def noise(shape: Shape, n: int) -> NDArray[np.uint8]:
    """The pixels [H, W, C] of image n."""
    channels, height, width = shape
    random = np.random.default_rng(n)
    return random.integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(shape: Shape, n: int) -> NDArray[np.uint8]:
    """Pixels that JPEG keeps well."""
    channels, height, width = shape
    rows, columns, colours = np.ogrid[:height, :width, :channels]
    return (rows * 2 + columns + colours * 40 + n).astype(np.uint8)


def made(
    output: Format, shape: Shape, first: int, count: int, label: int | None = None, **extra: Any
) -> list[Made]:
    """Images of noise, or samples; with ``label`` None, or classes label, label + 1, ..."""
    images = []
    for n in range(first, first + count):
        pixels: NDArray[Any] = noise(shape, n)
        if output.takes == "samples":
            pixels = np.moveaxis(pixels, -1, 0).astype(np.float32) / np.float32(127.5) - 1
        images.append(Made(n, pixels, None if label is None else label + n - first, extra))
    return images


def encoded(output: Format, images: list[Made]) -> Iterator[tuple[Made, bytes]]:
    """What `Format.write` takes."""
    for image in images:
        yield image, output.encode(image)


def write(output: Format, path: Path, images: list[Made]) -> Path:
    """A shard of these images."""
    output.check()
    output.write(path, encoded(output, images), len(images))
    return path


def content(path: Path) -> dict[str, bytes]:
    """Every file of a shard, which may be a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.name: file.read_bytes() for file in path.iterdir()}
