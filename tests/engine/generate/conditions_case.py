"""What the tests of conditions share: files, their tables, and what a refusal says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stepfuse.engine.generate.conditions.labels import Labels
from stepfuse.engine.generate.conditions.table import Table, index, open_table

NAMES = ("circle", "square", "star")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """A new file."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table_of(
    path: Path,
    names: Sequence[str] = NAMES,
    *,
    per_row: int = 1,
    otherwise: Labels | None = None,
) -> Table:
    """The table of a file, whose index is written beside it."""
    place = path.with_suffix(".idx")
    index(path, names, place)
    return open_table(path, place, names, per_row=per_row, otherwise=otherwise)


def refused(path: Path, line: str, names: Sequence[str] = NAMES) -> None:
    """The file has no index, and the error is its path and this line, a regular expression."""
    place = path.with_suffix(".idx")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}{line}$") as error:
        index(path, names, place)
    assert len(str(error.value)) < 600
    assert not place.exists()


def everything(table: Table) -> list[tuple[Any, ...]]:
    """Every row of the file, as (label, seed, guidance, extra)."""
    rows = table.rows(0, table.index.facts.rows * table.per_row)
    return [(row.label, row.seed, row.guidance, dict(row.extra)) for row in rows]
