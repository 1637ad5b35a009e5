"""The npz files that the evaluators of guided-diffusion read: arr_0, the images; arr_1, classes.

Both arrays are stored, arr_0 first, so that a reader may go through the images without loading
them. Grey is repeated, because the evaluators' network takes three channels.
"""

from __future__ import annotations

import io
import platform
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from stepfuse.engine.generate.formats.encode import folded
from stepfuse.engine.generate.formats.format import (
    NO_CLASS,
    Shape,
    Takes,
    check_pixels,
    counted,
    cut_off,
    damaged,
    npy_header,
    read_npy_header,
)
from stepfuse.engine.generate.made import Made

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
CHANNELS = 3
PIECE = 1 << 20  # bytes
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can name
_UNIX, _MODE = 3, 0o644
_BAD = (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError)


@dataclass(frozen=True)
class Npz:
    """Arrays uint8 [N, H, W, 3] and, where the model has classes, int64 [N] with -1 for none.

    ``Made.extra`` has no place in it.
    """

    name: ClassVar[str] = "npz"
    ending: ClassVar[str] = ".npz"
    takes: ClassVar[Takes] = "pixels"

    def settings(self) -> dict[str, Any]:
        """The name: there are no options."""
        return {"name": self.name}

    def libraries(self) -> dict[str, str]:
        """Python, which writes the zip file."""
        return {"python": ".".join(platform.python_version_tuple()[:2])}

    def check(self) -> None:
        """Nothing is missing: Python reads and writes zip files."""

    def encode(self, made: Made) -> bytes:
        """Red, green and blue, pixel by pixel."""
        pixels = check_pixels(made)
        return np.broadcast_to(pixels, (*pixels.shape[:2], CHANNELS)).tobytes()

    def write(self, path: Path, encoded: Iterable[tuple[Made, bytes]], count: int) -> None:
        """Make the file ``path``. The classes are kept until the images are written: 8 bytes each.

        Raises ValueError for images of several sizes, and where only some have a label.
        """
        images = counted(encoded, count)
        head, content = next(images)
        height, width = head.pixels.shape[:2]
        labels = array("q")

        def noting() -> Iterator[bytes]:
            for made, data in chain([(head, content)], images):
                if made.pixels.shape != head.pixels.shape:
                    raise ValueError(
                        f"images of an npz file must have one shape: image {head.n} has "
                        f"{head.pixels.shape}; got {made.pixels.shape} for image {made.n}"
                    )
                if (made.label is None) != (head.label is None):
                    raise ValueError(
                        f"all images must have a label or none: image {head.n} has "
                        f"{head.label}; got {made.label} for image {made.n}"
                    )
                if made.label is not None:
                    labels.append(int(made.label))
                yield data

        with path.open("xb") as file:
            for piece in pieces(
                (count, height, width),
                noting(),
                None if head.label is None else lambda: labels,
            ):
                file.write(piece)

    def entries(self, path: Path, first: int) -> Iterator[tuple[int, bytes]]:
        """The images, three channels each."""
        n = first
        try:
            with zipfile.ZipFile(path) as archive, archive.open(IMAGES) as member:
                file = cast(BinaryIO, member)
                count, height, width, channels = read_npy_header(file, "|u1", 4)
                if channels != CHANNELS:
                    raise ValueError(f"{IMAGES} must have {CHANNELS} channels; got {channels}")
                for n in range(first, first + count):
                    yield n, cut_off(file, height * width * channels)
                if file.read(1):
                    raise ValueError(f"{IMAGES} goes on after its last image")
        except zipfile.BadZipFile as error:
            # the sum of an array is known at its end, the place of the damage is not
            where = f"image {first} or one after it"
            raise ValueError(f"{path}: {where} cannot be read: {error}") from error
        except _BAD as error:
            raise damaged(path, n, error) from error

    def labels(self, path: Path, first: int) -> Iterator[int]:
        """The numbers of arr_1; -1 for every image where it is missing."""
        n = first
        try:
            with zipfile.ZipFile(path) as archive:
                with archive.open(IMAGES) as member:
                    count = read_npy_header(cast(BinaryIO, member), "|u1", 4)[0]
                if LABELS not in archive.namelist():
                    yield from (NO_CLASS for _ in range(count))
                    return
                with archive.open(LABELS) as member:
                    file = cast(BinaryIO, member)
                    (found,) = read_npy_header(file, "<i8", 1)
                    if found != count:
                        raise ValueError(f"there are {count} images and {found} labels")
                    while n < first + count:
                        yield int.from_bytes(cut_off(file, 8), "little", signed=True)
                        n += 1
        except _BAD as error:
            raise damaged(path, n, f"its label: {error}") from error

    def decode(self, encoded: bytes, shape: Shape) -> NDArray[Any]:
        """The pixels [H, W, C], grey as one channel again."""
        channels, height, width = shape
        if len(encoded) != height * width * CHANNELS:
            raise ValueError(
                f"{height} x {width} pixels are {height * width * CHANNELS} bytes; "
                f"got {len(encoded)}"
            )
        pixels = np.frombuffer(encoded, np.uint8).reshape(height, width, CHANNELS)
        return folded(pixels, channels).copy()


def pieces(
    shape: tuple[int, int, int],
    images: Iterable[bytes],
    labels: Callable[[], Iterable[int]] | None,
) -> Iterator[bytes]:
    """The content of such a file, in pieces of about a megabyte or of one image.

    Args:
        shape: (N, H, W).
        images: N times H W 3 bytes.
        labels: called when the images are through; None for no arr_1.

    Raises ValueError where images or labels are more or fewer than N, or of another size.
    """
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        size = shape[1] * shape[2] * CHANNELS
        header = npy_header("|u1", (*shape, CHANNELS))
        yield from _member(archive, pipe, IMAGES, header, _checked(images, shape[0], size))
        if labels is not None:
            numbers = (int(label).to_bytes(8, "little", signed=True) for label in labels())
            header = npy_header("<i8", shape[:1])
            yield from _member(archive, pipe, LABELS, header, _checked(numbers, shape[0], 8))
    yield pipe.taken()


def _member(
    archive: zipfile.ZipFile, pipe: _Pipe, name: str, header: bytes, rows: Iterable[bytes]
) -> Iterator[bytes]:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = _UNIX
    info.external_attr = _MODE << 16
    with archive.open(info, "w", force_zip64=True) as file:
        file.write(header)
        for row in rows:
            file.write(row)
            if pipe.size >= PIECE:
                yield pipe.taken()


def _checked(rows: Iterable[bytes], count: int, size: int) -> Iterator[bytes]:
    seen = 0
    for row in rows:
        if len(row) != size or seen == count:
            raise ValueError(
                f"{count} rows of {size} bytes were announced; got {len(row)} bytes for row {seen}"
            )
        yield row
        seen += 1
    if seen < count:
        raise ValueError(f"{count} rows of {size} bytes were announced; got {seen}")


class _Pipe(io.RawIOBase):
    """What is written to it can be taken again; zipfile, which cannot go back, never does."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.parts.append(bytes(content))
        self.size += len(content)
        return len(content)

    def taken(self) -> bytes:
        """What has come since the last time."""
        content = b"".join(self.parts)
        self.parts, self.size = [], 0
        return content
