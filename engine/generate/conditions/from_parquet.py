"""Rows of Parquet, by pyarrow, which is imported where such a file is opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

from stepfuse.engine.files.reading import reason
from stepfuse.engine.generate.arrow import arrow
from stepfuse.engine.generate.conditions.records import BadRow, BadTable, Record, Start
from stepfuse.engine.generate.conditions.values import COLUMNS

ROWS = 4096  # that are decoded at a time


class Parquet:
    """Row groups, each of which can be begun with; within one, the rows before are passed over."""

    name = "parquet"
    endings: tuple[str, ...] = (".parquet",)
    in_order = False

    def records(self, file: BinaryIO, start: Start | None = None) -> Iterator[Record]:
        """Values are what pyarrow makes of them; columns of ours may have any type."""
        pyarrow = arrow("reading Parquet")
        errors = (pyarrow.ArrowException, OSError)
        try:
            table = arrow("reading Parquet", "pyarrow.parquet").ParquetFile(file)
        except errors as error:
            raise BadTable(f"is no Parquet file: {reason(error)}") from None
        names = table.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadTable(
                f"has two columns {twice[0]!r:.100}; accepted: a name of its own for each"
            )
        mark, skip = (start.mark, start.skip) if start else (0, 0)
        records = _records(table, mark, skip)
        while True:
            try:
                record = next(records, None)
            except errors as error:
                raise BadRow(f"cannot be read: {reason(error)}") from None
            if record is None:
                return
            yield record


def _records(table: Any, mark: int, skip: int) -> Iterator[Record]:
    for group in range(mark, table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if skip >= rows:
            skip -= rows
            continue
        first = skip == 0
        for batch in table.iter_batches(ROWS, row_groups=[group], use_threads=False):
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            for values in batch.slice(skip).to_pylist():
                for name, value in values.items():
                    if name not in COLUMNS:
                        _check_json(name, value)
                yield Record(values, group if first else None, None)
                first = False
            skip = 0


def _check_json(name: str, value: Any) -> None:
    """Raise `BadRow` for what JSON does not have: it goes into files of JSON."""
    if value is None or isinstance(value, (str, int)):
        return
    if isinstance(value, float) and math.isfinite(value):
        return
    if isinstance(value, (list, tuple)):
        for entry in value:
            _check_json(name, entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_json(f"{name}.{key}", entry)
    else:
        raise BadRow(
            f"column {name!r} must hold text, finite numbers, true or false, or lists and structs "
            f"of them; got {value!r:.100}"
        )
