"""Samples, not pixels: one npy file, float32 [N, C, H, W], of any number of channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stepfuse.engine.generate.formats.format import (
    NO_CLASS,
    Shape,
    Takes,
    counted,
    cut_off,
    damaged,
    npy_header,
    read_npy_header,
)
from stepfuse.engine.generate.made import Made

DTYPE = "<f4"


@dataclass(frozen=True)
class Npy:
    """The samples as they are, latents too. Labels and ``Made.extra`` have no place in it."""

    name: ClassVar[str] = "npy"
    ending: ClassVar[str] = ".npy"
    takes: ClassVar[Takes] = "samples"

    def settings(self) -> dict[str, Any]:
        """The name: there are no options."""
        return {"name": self.name}

    def libraries(self) -> dict[str, str]:
        """None: the header is written here, the rest are the samples."""
        return {}

    def check(self) -> None:
        """Nothing is missing."""

    def encode(self, made: Made) -> bytes:
        """The numbers, little-endian."""
        samples = made.pixels
        if samples.dtype != np.float32:
            raise TypeError(f"samples of image {made.n} must be float32; got {samples.dtype}")
        if samples.ndim != 3 or 0 in samples.shape:
            raise ValueError(
                f"samples of image {made.n} must be [C, H, W]; got shape {samples.shape}"
            )
        return samples.astype(DTYPE, copy=False).tobytes()

    def write(self, path: Path, encoded: Iterable[tuple[Made, bytes]], count: int) -> None:
        """Make the file ``path``. Raises ValueError for samples of several shapes."""
        shape: tuple[int, ...] | None = None
        with path.open("xb") as file:
            for made, content in counted(encoded, count):
                if shape is None:
                    shape = made.pixels.shape
                    file.write(npy_header(DTYPE, (count, *shape)))
                if made.pixels.shape != shape:
                    raise ValueError(
                        f"samples of an npy file must have one shape: {shape}; "
                        f"got {made.pixels.shape} for image {made.n}"
                    )
                file.write(content)

    def entries(self, path: Path, first: int) -> Iterator[tuple[int, bytes]]:
        """The numbers of every image."""
        n = first
        try:
            with path.open("rb") as file:
                count, *shape = read_npy_header(file, DTYPE, 4)
                size = 4 * math.prod(shape)
                if size > path.stat().st_size:
                    raise ValueError(f"an image of shape {shape} is longer than the file")
                for n in range(first, first + count):
                    yield n, cut_off(file, size)
                if file.read(1):
                    raise ValueError("the file goes on after its last image")
        except ValueError as error:
            raise damaged(path, n, error) from error

    def labels(self, path: Path, first: int) -> Iterator[int]:
        """-1 for every image: this format has no labels."""
        try:
            with path.open("rb") as file:
                count = read_npy_header(file, DTYPE, 4)[0]
        except ValueError as error:
            raise damaged(path, first, error) from error
        yield from (NO_CLASS for _ in range(count))

    def decode(self, encoded: bytes, shape: Shape) -> NDArray[Any]:
        """The samples, float32 [C, H, W]."""
        size = 4 * shape[0] * shape[1] * shape[2]
        if len(encoded) != size:
            raise ValueError(f"samples of shape {shape} are {size} bytes; got {len(encoded)}")
        return np.frombuffer(encoded, DTYPE).reshape(shape).astype(np.float32)
