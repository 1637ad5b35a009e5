"""Rows as they come out of a file, before anybody knows what they mean."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol

MOST_BYTES = 2**20  # of one row of a text file


class BadTable(ValueError):
    """What is wrong with a whole file, with its header say."""


class BadRow(ValueError):
    """What is wrong with the row that was to come; ``line`` says where it ends, if it is text."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class Record(NamedTuple):
    """One row.

    Attributes:
        values: by the names of their columns.
        mark: from which `Reader.records` can begin with this row; None where it cannot.
        line: number of the line it ends on, from 1 on; None where there are no lines.
    """

    values: Mapping[str, Any]
    mark: int | None
    line: int | None


class Start(NamedTuple):
    """Where to begin.

    Attributes:
        mark: of an earlier record of the same file.
        skip: how many rows from there on are not wanted.
        columns: of the file's first row.
    """

    mark: int
    skip: int
    columns: tuple[str, ...]


class Reader(Protocol):
    """A format of tables.

    Attributes:
        name: of the format.
        endings: of its files.
        in_order: whether the whole file is read from its beginning to its end, each byte once.
    """

    name: str
    endings: tuple[str, ...]
    in_order: bool

    def records(self, file: BinaryIO, start: Start | None = None) -> Iterator[Record]:
        """The rows of an open file, one at a time and none ahead.

        Without ``start`` the file is at its beginning and all rows come.

        Raises `BadTable` or `BadRow`.
        """


class Lines:
    """The lines of a text in UTF-8, which knows where it is: what `csv.reader` reads from.

    Args:
        file: read in order from where it stands.
        at: where it stands, in bytes.
    """

    def __init__(self, file: BinaryIO, at: int = 0) -> None:
        self.file, self.at, self.number = file, at, 0
        self._begin = at

    def begin(self) -> int:
        """Begin a row, which has `MOST_BYTES` at most; returns where."""
        self._begin = self.at
        return self.at

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline(MOST_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        first = self.at == 0
        self.at += len(line)
        if self.at - self._begin > MOST_BYTES:
            raise self.bad(
                f"is longer than {MOST_BYTES} bytes, the most a row may have; "
                "a quote may be opened and never closed"
            )
        if first:
            line = line.removeprefix(codecs.BOM_UTF8)
        if b"\0" in line:
            raise self.bad("holds a zero byte; accepted: text in UTF-8")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"is no text in UTF-8: {error}") from None

    def bad(self, message: str) -> BadRow:
        """The error of a row that ends here."""
        return BadRow(message, self.number)


class Blanks:
    """Lets blank lines end a file, and refuses them elsewhere, where they would move the images."""

    def __init__(self) -> None:
        self._line: int | None = None

    def skips(self, blank: bool, lines: Lines) -> bool:
        """Whether this row is blank. Raises `BadRow` for one that is not, behind one that is."""
        if blank:
            self._line = self._line or lines.number
        elif self._line is not None:
            raise BadRow(f"is blank, but rows follow in line {lines.number}", self._line)
        return blank
