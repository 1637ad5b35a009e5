"""A file of conditions: read once as a whole when a job is created, then at any row."""

from __future__ import annotations

import hashlib
import io
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stepfuse.engine.files.reading import open_regular
from stepfuse.engine.generate.conditions.classes import Classes
from stepfuse.engine.generate.conditions.from_csv import Csv
from stepfuse.engine.generate.conditions.from_jsonl import JsonLines
from stepfuse.engine.generate.conditions.from_parquet import Parquet
from stepfuse.engine.generate.conditions.labels import Labels
from stepfuse.engine.generate.conditions.marks import EVERY, Facts, Index, load, save
from stepfuse.engine.generate.conditions.records import BadTable, Reader, Start
from stepfuse.engine.generate.conditions.row import Row, check_span
from stepfuse.engine.generate.conditions.values import LABEL, check_column, row_of
from stepfuse.kernels.arguments import PathLike
from stepfuse.kernels.checks import as_integer

READERS: tuple[Reader, ...] = (Csv(), JsonLines(), Parquet())
ACCEPTED = "a file of CSV, JSON Lines or Parquet"
_CHUNK = 2**20  # bytes read at a time

Progress = Callable[[int], object]  # takes bytes that were read since the last call: `tqdm.update`


def index(
    path: PathLike,
    names: Sequence[str],
    index_path: PathLike,
    *,
    unlabelled: bool = False,
    progress: Progress | None = None,
) -> Index:
    """Read all of ``path`` once, check every value and write the index to ``index_path``.

    The memory this takes does not grow with the file, but for 16 bytes in every 4096 rows.

    Args:
        path: a file that ends in .csv, .jsonl, .ndjson or .parquet.
        names: of the model's classes; empty for a model without.
        index_path: replaced if it is there.
        unlabelled: refuse a file with labels, which are chosen by other means.
        progress: called with the number of bytes that were read since its last call.

    Raises ValueError for a bad value, with the row's number, the first being 0, the value and what
    is accepted; for a file without rows, or one that is changed meanwhile. OSError for a file that
    cannot be read, `BackendUnavailable` where pyarrow is needed and missing.
    """
    reader = _reader_of(path)
    with open_regular(path, ACCEPTED) as file:
        before = _stamp(file)
        hashed = _Hashed(file, progress)
        if reader.in_order:
            stream: BinaryIO = io.BufferedReader(hashed, _CHUNK)
        else:
            hashed.drain()
            file.seek(0)
            stream = file
        found = _scan(Path(path), reader, stream, Classes(tuple(names)), unlabelled)
        if _stamp(file) != before or hashed.count != before[0]:
            raise ValueError(
                f"{Path(path)} was changed while it was read; accepted: a file at rest"
            )
    rows, columns, guided, marks = found
    facts = Facts(reader.name, hashed.sha256(), *before, rows, columns, guided)
    made = Index(facts, np.array(marks, np.uint64).reshape(-1, 2))
    save(index_path, made)
    return made


def open_table(
    path: PathLike,
    index_path: PathLike,
    names: Sequence[str],
    *,
    per_row: int = 1,
    otherwise: Labels | None = None,
    progress: Progress | None = None,
) -> Table:
    """The conditions in ``path``, which `index` has read.

    A file of the size and the time of the index is taken for the same; any other is hashed, and has
    to be the same.

    Args:
        path, index_path, names: those given to `index`. The file may have moved.
        per_row: how many images each row is for.
        otherwise: the labels where the file has none; None where it has.
        progress: as in `index`, of hashing.

    Raises ValueError for a file of another content, a damaged index, and for labels in the file and
    in ``otherwise``, or in neither; OSError for what cannot be read.
    """
    table = Table(path, load(index_path), names, per_row, otherwise)
    table.verify(progress)
    return table


class Table:
    """Conditions in a file; see `open_table`, which makes one and looks whether it is the same.

    Rows may be asked for in any order and from any thread: every call opens the file by itself,
    begins at the nearest mark and passes over less than 4096 rows, or those of a Parquet row group.
    """

    def __init__(
        self,
        path: PathLike,
        index: Index,
        names: Sequence[str],
        per_row: int = 1,
        otherwise: Labels | None = None,
    ) -> None:
        self.path, self.index, self.classes = Path(path), index, Classes(tuple(names))
        self.per_row, self.otherwise = check_per_row(per_row), otherwise
        self._reader = _reader_named(index.facts.format)
        self._stamp = (index.facts.size, index.facts.mtime_ns)
        if self.labelled and otherwise is not None:
            raise ValueError(
                f"{self.path} has a column of labels; accepted: no other choice of labels"
            )
        if not self.labelled and otherwise is None:
            raise ValueError(f"{self.path} has no column of labels; accepted: a choice of labels")

    @property
    def labelled(self) -> bool:
        """Whether the labels are those of the file."""
        return LABEL in self.index.facts.columns

    @property
    def guided(self) -> bool:
        """Whether any row has a guidance of its own."""
        return self.index.facts.guided

    def settings(self) -> dict[str, Any]:
        """What decides the rows: the file's content, not its place."""
        facts = self.index.facts
        return {
            "kind": "file",
            "format": facts.format,
            "sha256": facts.sha256,
            "rows": facts.rows,
            "columns": list(facts.columns),
            "per_row": self.per_row,
            "classes": list(self.classes.names),
            "otherwise": None if self.otherwise is None else self.otherwise.settings(),
        }

    def check(self, n: int) -> None:
        """Raise ValueError unless the rows are enough for ``n`` images."""
        rows = self.index.facts.rows
        if n > rows * self.per_row:
            each = "" if self.per_row == 1 else f" of {self.per_row} images each"
            raise ValueError(
                f"{self.path} has too few rows: {rows}{each}, {-(-n // self.per_row)} are needed "
                f"for {n} images"
            )

    def rows(self, first: int, count: int) -> list[Row]:
        """Those of images first .. first+count-1, image n having row n // per_row or the last.

        Raises ValueError where the file's content has changed, OSError where it cannot be read.
        """
        check_span(first, count)
        if not count:
            return []
        last = self.index.facts.rows - 1
        begin, end = (min(n // self.per_row, last) for n in (first, first + count - 1))
        found = self._read(begin, end - begin + 1)
        rows = [found[min(n // self.per_row, last) - begin] for n in range(first, first + count)]
        if self.otherwise is None:
            return rows
        labels = self.otherwise.labels(first, count)
        return [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]

    def verify(self, progress: Progress | None = None) -> None:
        """Raise ValueError, which names the file, where its content has changed."""
        self._open(progress).close()

    def _read(self, first: int, count: int) -> list[Row]:
        """Rows first .. first+count-1 of the file."""
        begin, mark = self.index.nearest(first)
        start = Start(mark, first - begin, self.index.facts.columns)
        rows: list[Row] = []
        with self._open() as file:
            try:
                for record in self._reader.records(file, start):
                    rows.append(row_of(record.values, self.classes, self.labelled))
                    if len(rows) == count:
                        return rows
            except BadTable as error:
                raise ValueError(f"{self.path}: {error}") from None
            except ValueError as error:
                raise ValueError(f"{self.path}, row {first + len(rows)}: {error}") from None
        raise ValueError(
            f"{self.path} ends before row {first + len(rows)}, but {self.index.facts.rows} rows "
            "were there when the job was created"
        )

    def _open(self, progress: Progress | None = None) -> BinaryIO:
        """The file, with the content that the index is of."""
        file = open_regular(self.path, ACCEPTED)
        try:
            stamp = _stamp(file)
            if stamp != self._stamp:
                self._compare(file, stamp[0], progress)
                self._stamp = stamp
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def _compare(self, file: BinaryIO, size: int, progress: Progress | None) -> None:
        facts = self.index.facts
        if size == facts.size:
            hashed = _Hashed(file, progress)
            hashed.drain()
            if hashed.sha256() == facts.sha256:
                return
            differs = f"its SHA-256 is {hashed.sha256()}; accepted: {facts.sha256}"
        else:
            differs = f"it has {size} bytes; accepted: {facts.size}"
        raise ValueError(f"{self.path} has changed since the job was created: {differs}")


def check_per_row(images: int) -> int:
    """How many images a row is for, checked."""
    if as_integer("per_row", images) < 1:
        raise ValueError(f"per_row must be at least 1; got {images}")
    return images


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is read, from where it stands."""

    def __init__(self, file: BinaryIO, progress: Progress | None) -> None:
        super().__init__()
        self.count = 0
        self._file, self._progress, self._digest = file, progress, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes, which are hashed and counted."""
        piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        self._digest.update(piece)
        self.count += len(piece)
        if self._progress is not None:
            self._progress(len(piece))
        return len(piece)

    def drain(self) -> None:
        """Read all that is left."""
        buffer = bytearray(_CHUNK)
        while self.readinto(buffer):
            pass

    def sha256(self) -> str:
        """Of what was read, in hexadecimal."""
        return self._digest.hexdigest()


def _scan(
    path: Path, reader: Reader, file: BinaryIO, classes: Classes, unlabelled: bool
) -> tuple[int, tuple[str, ...], bool, array[int]]:
    """The number of rows, the columns, whether any row has a guidance, and the marks."""
    marks = array("Q")
    columns: tuple[str, ...] = ()
    rows, line, guided = 0, None, False
    try:
        for record in reader.records(file):
            line = record.line
            if not rows:
                columns = tuple(record.values)
                _check_columns(columns, unlabelled)
            row = row_of(record.values, classes, LABEL in columns)
            guided = guided or row.guidance is not None
            if record.mark is not None and (not rows or rows - marks[-2] >= EVERY):
                marks.extend((rows, record.mark))
            rows, line = rows + 1, None
    except BadTable as error:
        raise ValueError(f"{path}: {error}") from None
    except ValueError as error:
        at = getattr(error, "line", line)
        where = "" if at is None else f" (line {at})"
        raise ValueError(f"{path}, row {rows}{where}: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows; accepted: one or more")
    return rows, columns, guided, marks


def _check_columns(names: tuple[str, ...], unlabelled: bool) -> None:
    if unlabelled and LABEL in names:
        raise BadTable("has a column of labels; accepted: no other choice of labels beside it")
    try:
        for name in names:
            check_column(name)
    except ValueError as error:
        raise BadTable(str(error)) from None


def _stamp(file: BinaryIO) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _reader_of(path: PathLike) -> Reader:
    ending = Path(path).suffix.lower()
    for reader in READERS:
        if ending in reader.endings:
            return reader
    accepted = ", ".join(ending for reader in READERS for ending in reader.endings)
    raise ValueError(f"conditions are read from files that end in {accepted}; got {Path(path)}")


def _reader_named(name: str) -> Reader:
    for reader in READERS:
        if reader.name == name:
            return reader
    accepted = ", ".join(reader.name for reader in READERS)
    raise ValueError(f"format of conditions must be one of {accepted}; got {name!r}")
