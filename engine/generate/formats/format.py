"""What every output format can do, and what the formats share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stepfuse.engine.files.images import check_channels
from stepfuse.engine.generate.made import Made

Shape = tuple[int, int, int]  # (C, H, W)
Takes = Literal["pixels", "samples"]

NO_CLASS = -1


class Format(Protocol):
    """One way to put images into files, with all its options.

    Every implementation is a frozen dataclass. What it writes is a function of the images and of
    the options alone: no time, owner, path or order of keys gets into a file. The versions of the
    libraries that compress do, see `libraries`.
    """

    @property
    def name(self) -> str:
        """The name by which `choose` knows it."""

    @property
    def ending(self) -> str:
        """The end of a shard's name, ".tar" say; empty where the shard is a folder."""

    @property
    def takes(self) -> Takes:
        """What `Made.pixels` must be: uint8 [H, W, C], or samples, float32 [C, H, W]."""

    def settings(self) -> dict[str, Any]:
        """The options as JSON values; `from_settings` makes the same format of them."""

    def libraries(self) -> dict[str, str]:
        """The versions of the libraries that the bytes depend on."""

    def check(self) -> None:
        """Raise `BackendUnavailable`, saying what to install, where a library is missing."""

    def encode(self, made: Made) -> bytes:
        """The bytes of one image alone. Pure; may be called by many threads at once.

        Raises TypeError and ValueError for pixels that the format does not hold.
        """

    def write(self, path: Path, encoded: Iterable[tuple[Made, bytes]], count: int) -> None:
        """Make the file, or the folder, ``path``, which must not exist.

        Images are written as they come and never kept. Nothing is flushed to the disk or renamed
        here, and after an error what was begun is left for the caller to remove.

        Args:
            path: its name does not get into the file.
            encoded: images with what `encode` made of them; their numbers follow each other.
            count: how many; at least 1.

        Raises ValueError where the images are fewer, more, or out of order.
        """

    def entries(self, path: Path, first: int) -> Iterator[tuple[int, bytes]]:
        """The numbers and encoded bytes of a shard that begins with image ``first``, in order.

        Raises ValueError that names the file and the image where the shard is damaged.
        """

    def labels(self, path: Path, first: int) -> Iterator[int]:
        """The class of every image of a shard, in order; -1 where none was written.

        Raises ValueError as `entries` does.
        """

    def decode(self, encoded: bytes, shape: Shape) -> NDArray[Any]:
        """What `encode` was given, [H, W, C] or [C, H, W] as in `Made`; JPEG loses a little.

        Raises ValueError for bytes that are no image of that shape (C, H, W).
        """


def numbered(n: int) -> str:
    """The name of image ``n``: twelve digits or more, so that names sort as numbers do."""
    return f"{n:012d}"


def damaged(path: Path, n: int, what: object) -> ValueError:
    """The error for image ``n`` of a shard that cannot be read."""
    return ValueError(f"{path}: image {n} cannot be read: {what}")


def decoded(
    output: Format, path: Path, first: int, count: int, shape: Shape
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The numbers and pixels of a shard that must hold the images first .. first + count - 1.

    Raises ValueError that names the file and the image where one is missing, damaged or too many.
    """
    expected = first
    for n, content in output.entries(path, first):
        if expected == first + count:
            raise ValueError(f"{path}: holds image {n}; its last should be {expected - 1}")
        try:
            pixels = output.decode(content, shape)
        except ValueError as error:
            raise damaged(path, n, error) from error
        yield n, pixels
        expected += 1
    if expected < first + count:
        last = first + count - 1
        raise ValueError(f"{path}: image {expected} is missing; its last should be {last}")


def counted(encoded: Iterable[tuple[Made, bytes]], count: int) -> Iterator[tuple[Made, bytes]]:
    """The images, while they are consecutive and as many as said; ValueError otherwise."""
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    seen = 0
    expected: int | None = None
    for made, content in encoded:
        if expected is not None and made.n != expected:
            raise ValueError(f"images must follow each other: expected {expected}; got {made.n}")
        if seen == count:
            raise ValueError(f"there are more than the {count} images announced: image {made.n}")
        yield made, content
        seen += 1
        expected = made.n + 1
    if seen < count:
        raise ValueError(f"{count} images were announced; got {seen}")


def check_pixels(made: Made) -> NDArray[np.uint8]:
    """The pixels of an image, which must be uint8 [H, W, 1] or [H, W, 3]; contiguous."""
    pixels = made.pixels
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels of image {made.n} must be uint8; got {pixels.dtype}")
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels of image {made.n} must be [H, W, C]; got shape {pixels.shape}")
    try:
        check_channels(pixels.shape[2])
    except ValueError as error:
        raise ValueError(f"image {made.n}: {error}; format npy takes any number") from None
    return np.ascontiguousarray(pixels)


def json_line(values: Mapping[str, Any]) -> str:
    """Values as one line of JSON, the same for equal values."""
    return json.dumps(
        dict(values), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )


def canonical_json(values: Mapping[str, Any], n: int) -> str:
    """The values beside image ``n`` as `json_line` writes them.

    Raises ValueError that names image ``n`` for what JSON cannot hold, NaN and infinities too.
    """
    try:
        return json_line(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the extra values of image {n} are not JSON: {error}") from error


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The bytes before the numbers of an npy file of version 1.0, in C order.

    By hand: NumPy's own differ from release to release in how much room they leave.
    """
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    fixed = len(np.lib.format.MAGIC_PREFIX) + 4  # the version and the length take two bytes each
    length = -(-(fixed + len(text) + 1) // np.lib.format.ARRAY_ALIGN) * np.lib.format.ARRAY_ALIGN
    body = text.ljust(length - fixed - 1).encode("latin1") + b"\n"
    return np.lib.format.MAGIC_PREFIX + b"\x01\x00" + len(body).to_bytes(2, "little") + body


def read_npy_header(file: BinaryIO, dtype: str, dimensions: int) -> tuple[int, ...]:
    """The shape that a header of `npy_header` says. Raises ValueError for any other header."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"npy version must be (1, 0); got {version}")
    header = np.lib.format.read_array_header_1_0(file)
    shape, fortran_order, found = header
    if fortran_order or found != np.dtype(dtype) or len(shape) != dimensions:
        raise ValueError(
            f"the array must be {dtype} of {dimensions} dimensions in C order; "
            f"got {found.str} of shape {shape}{' in Fortran order' if fortran_order else ''}"
        )
    return tuple(int(size) for size in shape)


def cut_off(file: BinaryIO, size: int) -> bytes:
    """The next ``size`` bytes. Raises ValueError where the file ends before."""
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"the file ends {size - len(content)} bytes too early")
    return content
