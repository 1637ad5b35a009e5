"""Shards of WebDataset: tar files of ``000000000123.png``, its ``.cls`` and its ``.json``."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from stepfuse.engine.generate.formats.encode import Encoder, Png
from stepfuse.engine.generate.formats.format import (
    NO_CLASS,
    canonical_json,
    counted,
    cut_off,
    damaged,
    numbered,
)
from stepfuse.engine.generate.formats.pictures import Pictures
from stepfuse.engine.generate.made import Made

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class WebDataset(Pictures):
    """A USTAR archive, not compressed, of modes 0644 and of owner and time 0.

    Every image is a file named by its number. Behind it comes ``.cls``, its class in decimal
    digits, where it has one, and ``.json`` where its ``extra`` is not empty.
    """

    name: ClassVar[str] = "webdataset"
    ending: ClassVar[str] = ".tar"
    encoder: Encoder = field(default_factory=Png)

    def write(self, path: Path, encoded: Iterable[tuple[Made, bytes]], count: int) -> None:
        """Make the archive ``path``."""
        with path.open("xb") as file:
            for made, content in counted(encoded, count):
                for suffix, data in self._files(made, content):
                    file.write(_header(f"{numbered(made.n)}{suffix}", len(data)))
                    file.write(data)
                    file.write(bytes(-len(data) % _BLOCK))
            file.write(bytes(2 * _BLOCK))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))

    def _files(self, made: Made, content: bytes) -> Iterator[tuple[str, bytes]]:
        yield self.encoder.suffix, content
        if made.label is not None and made.label != NO_CLASS:
            yield ".cls", str(int(made.label)).encode()
        if made.extra:
            yield ".json", canonical_json(made.extra, made.n).encode()

    def entries(self, path: Path, first: int) -> Iterator[tuple[int, bytes]]:
        """The pictures of the archive."""
        with path.open("rb") as file:
            for n, members in _samples(path, file, first, self.encoder.suffix):
                yield n, members.read(self.encoder.suffix)

    def labels(self, path: Path, first: int) -> Iterator[int]:
        """What the files ``.cls`` say."""
        with path.open("rb") as file:
            for n, members in _samples(path, file, first, self.encoder.suffix):
                text = members.read(".cls") if ".cls" in members.at else str(NO_CLASS).encode()
                try:
                    yield int(text)
                except ValueError:
                    raise damaged(path, n, f"its class is {text[:40]!r}") from None

    def extras(self, path: Path, first: int) -> Iterator[dict[str, Any]]:
        """What the files ``.json`` say, {} where there is none."""
        with path.open("rb") as file:
            for n, members in _samples(path, file, first, self.encoder.suffix):
                try:
                    text = members.read(".json") if ".json" in members.at else b"{}"
                    yield dict(json.loads(text))
                except (ValueError, TypeError) as error:
                    raise damaged(path, n, f"its .json: {error}") from error


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # time, owner and group are 0, their names empty
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


class _Sample:
    """Where the files of one image lie in an archive: suffix to (offset, size)."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.at: dict[str, tuple[int, int]] = {}

    def read(self, suffix: str) -> bytes:
        """The content of one of them."""
        offset, size = self.at[suffix]
        here = self.file.tell()
        self.file.seek(offset)
        content = cut_off(self.file, size)
        self.file.seek(here)
        return content


def _samples(path: Path, file: BinaryIO, first: int, suffix: str) -> Iterator[tuple[int, _Sample]]:
    """The images of an archive from ``first`` on, each when its last file has been passed.

    Python's own reader keeps what it has passed, which grows with the archive.
    """
    n = first - 1
    sample: _Sample | None = None
    size = path.stat().st_size
    while True:
        try:
            info = _member(file)
        except (tarfile.HeaderError, ValueError) as error:
            if sample is None:
                raise damaged(path, first, error) from error
            where = f"image {n + 1}, or what is written beside image {n}"
            raise ValueError(f"{path}: {where}, cannot be read: {error}") from error
        key, _, rest = (info.name if info else "").partition(".")
        if info is None or (sample is not None and f".{rest}" == suffix):
            if sample is not None:
                yield n, sample
            if info is None:
                return
        offset = file.tell()
        if f".{rest}" == suffix:
            n, sample = n + 1, _Sample(file)
        if sample is None or key != numbered(n):
            raise damaged(path, max(n, first), f"{info.name!r} is in its place")
        end = offset + info.size + -info.size % _BLOCK
        if end > size:
            raise damaged(path, n, f"the file ends {end - size} bytes too early")
        sample.at[f".{rest}"] = offset, info.size
        file.seek(end)


def _member(file: BinaryIO) -> tarfile.TarInfo | None:
    """The next header; None for the blocks of zeros at the end."""
    block = cut_off(file, _BLOCK)
    if not any(block):
        if any(cut_off(file, _BLOCK)):
            raise ValueError("only half of the end of the archive is there")
        return None
    return tarfile.TarInfo.frombuf(block, "ascii", "strict")
