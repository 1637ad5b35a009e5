"""Rows of CSV: comma, double quotes, a header; fields may hold line ends."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from stepfuse.engine.generate.conditions.records import (
    BadRow,
    BadTable,
    Blanks,
    Lines,
    Record,
    Start,
)
from stepfuse.engine.generate.words import many

_OTHERS = {";": "semicolons", "\t": "tabs"}
_WHYS = {  # by what the errors of `csv` say
    "unexpected end": "a quote is opened and never closed",
    "new-line character": "a carriage return stands outside quotes and not at the end of a line",
}


class Csv:
    """The format as RFC 4180 has it, with any line end and with or without a BOM."""

    name = "csv"
    endings: tuple[str, ...] = (".csv",)
    in_order = True

    def records(self, file: BinaryIO, start: Start | None = None) -> Iterator[Record]:
        """Values are text, those of a row in the order of the header."""
        if start is None:
            lines = Lines(file)
            reader = csv.reader(lines, strict=True)
            try:
                columns = _header(next(_parsed(reader, lines), []))
            except BadRow as error:
                raise BadTable(f"has a header that {error}") from None
            return _records(reader, lines, columns)
        file.seek(start.mark)
        lines = Lines(file, start.mark)
        records = _records(csv.reader(lines, strict=True), lines, start.columns)
        return islice(records, start.skip, None)


def _records(
    reader: Iterator[list[str]], lines: Lines, columns: tuple[str, ...]
) -> Iterator[Record]:
    blanks = Blanks()
    rows = _parsed(reader, lines)
    while True:
        mark = lines.begin()
        fields = next(rows, None)
        if fields is None:
            return
        if blanks.skips(not fields, lines):
            continue
        if len(fields) != len(columns):
            raise lines.bad(
                f"has {many(len(fields), 'field')}; accepted: "
                f"{len(columns)}, as the header has ({', '.join(columns):.200})"
            )
        yield Record(dict(zip(columns, fields, strict=True)), mark, lines.number)


def _parsed(reader: Iterator[list[str]], lines: Lines) -> Iterator[list[str]]:
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            why = next((words for part, words in _WHYS.items() if part in str(error)), str(error))
            raise lines.bad(f"is no row of CSV: {why}") from None
        if fields is None:
            return
        yield fields


def _header(columns: list[str]) -> tuple[str, ...]:
    if not columns:
        raise BadTable("has no header; accepted: a first line with the names of the columns")
    for character, words in _OTHERS.items():
        if len(columns) == 1 and character in columns[0]:
            raise BadTable(f"has columns parted by {words}; accepted: commas")
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise BadTable(f"has two columns {twice[0]!r:.100}; accepted: a name of its own for each")
    return tuple(columns)
