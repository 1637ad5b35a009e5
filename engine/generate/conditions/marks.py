"""The index of a conditions file: what it was when it was read, and where its rows are.

Four parts: a line that says what it is; one with the CRC-32 of what follows; a line of JSON; and
the marks, uint64 [K, 2], little-endian: a row's number and what its reader can begin from, see
`stepfuse.engine.generate.conditions.records`.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepfuse.engine.files.reading import open_regular
from stepfuse.engine.files.writing import write_file

EVERY = 4096  # rows from one mark to the next, at least
_MAGIC = b"stepfuse conditions index 1\n"
_DTYPE = np.dtype("<u8")
_MOST_BYTES = 2**30  # of an index: marks of 10^11 rows


@dataclass(frozen=True)
class Facts:
    """What a pass over a conditions file has found.

    Attributes:
        format: name of the reader.
        sha256: of the file, in hexadecimal.
        size: of the file, in bytes.
        mtime_ns: when it was changed last.
        rows: how many it has.
        columns: of its first row.
        guided: whether any row has a guidance.
    """

    format: str
    sha256: str
    size: int
    mtime_ns: int
    rows: int
    columns: tuple[str, ...]
    guided: bool


@dataclass(frozen=True)
class Index:
    """The facts, and the marks as uint64 [K, 2], in the order of their rows."""

    facts: Facts
    marks: NDArray[np.uint64]

    def nearest(self, row: int) -> tuple[int, int]:
        """The last row up to ``row`` that has a mark, and this mark."""
        at = int(np.searchsorted(self.marks[:, 0], np.uint64(row), side="right")) - 1
        begin, mark = self.marks[at].tolist()
        return begin, mark


def save(path: str | os.PathLike[str], index: Index) -> None:
    """Write an index; it is whole or not there. OSError names ``path``."""
    marks = np.ascontiguousarray(index.marks, _DTYPE).tobytes()
    content = json.dumps(asdict(index.facts)).encode() + b"\n" + marks
    write_file(path, (_MAGIC, b"%08x\n" % zlib.crc32(content), content))


def load(path: str | os.PathLike[str]) -> Index:
    """Read an index. Raises OSError, and ValueError for what is none or is damaged."""
    with open_regular(path, "an index of conditions") as file:
        # what is far too large is not read: it is none
        content = file.read() if os.fstat(file.fileno()).st_size <= _MOST_BYTES else b""
    try:
        return _parsed(content)
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{Path(path)} is no index of conditions, or it is damaged; accepted: what stepfuse "
            "wrote when the job was created"
        ) from None


def _parsed(content: bytes) -> Index:
    if not content.startswith(_MAGIC):
        raise ValueError("another beginning")
    checksum, _, content = content[len(_MAGIC) :].partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(content):
        raise ValueError("another checksum")
    facts, _, marks = content.partition(b"\n")
    info = json.loads(facts)
    table = np.frombuffer(marks, _DTYPE).reshape(-1, 2).astype(np.uint64, copy=False)
    return Index(Facts(**{**info, "columns": tuple(info["columns"])}), table)
