"""A shard, compared with its record."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepfuse.engine.generate import shards
from stepfuse.engine.generate.formats import Format
from stepfuse.engine.generate.formats.format import cut_off, read_npy_header
from stepfuse.engine.generate.formats.npz import IMAGES, Npz
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.work import measured

_LENGTHS = 26  # bytes before those of the name and the extra field in a zip file's local header
_BAD = (OSError, ValueError, KeyError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Difference:
    """What is not as it should be.

    Attributes:
        n: number of the image; None for what is not about one image.
        shard: its number.
        what: in words.
    """

    n: int | None
    shard: int
    what: str

    def __str__(self) -> str:
        shard = f"shard {shards.name(self.shard)}"
        return (
            f"{shard}: {self.what}" if self.n is None else f"image {self.n}, {shard}: {self.what}"
        )


def read_shard(
    format: Format,
    path: Path,
    record: Record,
    keep: Callable[[int, bytes], Any] | None = None,
) -> Iterator[Difference]:
    """Everything that is not as the record says: images that are other ones, missing or too many.

    ``keep`` sees the number and the bytes of every image that can be read. A file that differs
    although every image is right has other labels, or whatever else is written beside them.
    """
    sums, k = record.checksums(), record.shard
    expected, end = record.first, record.first + record.count
    right = True
    try:
        size, sha256 = measured(path)
        for n, content in _entries(format, path, record.first):
            if n == end:
                right = False
                yield Difference(n, k, f"should not be there; the last one is image {end - 1}")
                break
            if keep is not None:
                keep(n, content)
            found = zlib.crc32(content)
            if found != sums[n - record.first]:
                right = False
                yield Difference(n, k, f"other bytes than its record says{_whose(found, record)}")
            expected = n + 1
    except _BAD as error:
        yield Difference(expected, k, str(error))
        return
    if expected < end:
        right = False
        yield Difference(expected, k, f"missing, with all that follow up to image {end - 1}")
    if right and (size, sha256) != (record.bytes, record.sha256):
        told = (
            f"{path} is of {size} bytes, its record of {record.bytes}"
            if size != record.bytes
            else f"{path} has sha256 {sha256[:12]}…, its record {record.sha256[:12]}…"
        )
        yield Difference(
            None, k, f"{told}; every image is right: labels, or what else is beside them, is not"
        )


def _entries(format: Format, path: Path, first: int) -> Iterator[tuple[int, bytes]]:
    """`Format.entries`; of an npz file without the one checksum that all its images share.

    That would say that one of them is damaged, but not which.
    """
    if not isinstance(format, Npz):
        yield from format.entries(path, first)
        return
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(IMAGES).header_offset
    with path.open("rb") as file:
        file.seek(start + _LENGTHS)
        name, extra = struct.unpack("<HH", cut_off(file, 4))
        file.seek(name + extra, os.SEEK_CUR)
        count, height, width, channels = read_npy_header(file, "|u1", 4)
        for n in range(first, first + count):
            yield n, cut_off(file, height * width * channels)


def _whose(checksum: int, record: Record) -> str:
    """In whose place the image would be right."""
    places = np.flatnonzero(record.checksums() == np.uint32(checksum))
    return f"; they are those of image {record.first + int(places[0])}" if len(places) else ""
