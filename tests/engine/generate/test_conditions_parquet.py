"""Parquet, where pyarrow is there; and what is said where it is not."""

from __future__ import annotations

import datetime
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.engine.generate.conditions_case import NAMES, everything, refused, table_of, written

from stepfuse.engine.generate.conditions import table
from stepfuse.engine.generate.conditions.table import index
from stepfuse.kernels.backends import BackendUnavailable


def parquet(folder: Path, columns: dict[str, Any], row_group: int | None = None) -> Path:
    """A file with these columns."""
    arrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    path = folder / "a.parquet"
    writer.write_table(arrow.table(columns), path, row_group_size=row_group)
    return path


def test_columns(tmp_path: Path) -> None:
    columns = {
        "label": ["star", "none", "0"],
        "seed": [7, None, -1],
        "guidance": [1.5, None, -2.0],
        "box": [[1, 2], None, []],
        "who": [{"name": "a"}, {"name": None}, None],
    }
    assert everything(table_of(parquet(tmp_path, columns))) == [
        (2, 7, 1.5, {"box": [1, 2], "who": {"name": "a"}}),
        (3, None, None, {"box": None, "who": {"name": None}}),
        (0, -1, -2.0, {"box": [], "who": None}),
    ]


@pytest.mark.parametrize("row_group", [1, 7, 5000, 100_000])
@pytest.mark.parametrize("every", [1, 4096])
def test_any_row_of_any_row_group(
    tmp_path: Path, row_group: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 12_001 if row_group > 1 else 301
    path = parquet(tmp_path, {"label": [n % 3 for n in range(count)], "n": range(count)}, row_group)
    monkeypatch.setattr(table, "EVERY", every)
    found = table_of(path)
    for first in (count - 1, 0, 6, 7, 8, 250, 4095, 4096, 5000):
        rows = found.rows(first, 20)
        expected = [min(n, count - 1) for n in range(first, first + 20)]
        assert [row.extra["n"] for row in rows] == expected
        assert [row.label for row in rows] == [n % 3 for n in expected]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"label": [0, None]}, ", row 1: label must be text or an integer: .*; got None"),
        ({"label": [0, 3]}, ", row 1: label must be one of .*; got '3'"),
        ({"label": [0.0, 1.0]}, ", row 0: label must be text or an integer: .*; got 0.0"),
        ({"label": [0], "guidance": [math.nan]}, ", row 0: guidance must be finite, .*; got nan"),
        ({"label": [0], "x": [math.inf]}, ", row 0: column 'x' must hold text, .*; got inf"),
        ({"label": [0], "x": [b"a"]}, ", row 0: column 'x' must hold text, .*; got b'a'"),
        (
            {"label": [0], "x": [[{"y": datetime.date(2020, 1, 2)}]]},
            ", row 0: column 'x.y' must hold text, .*",
        ),
        ({"label": [0], "steps": [5]}, ": has a column 'steps': .*"),
        ({"label": []}, " holds no rows; accepted: one or more"),
    ],
)
def test_what_is_no_row(tmp_path: Path, columns: dict[str, Any], line: str) -> None:
    refused(parquet(tmp_path, columns), line)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"label\n1\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_file_of_parquet(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("pyarrow")
    refused(written(tmp_path, "a.parquet", content), ": is no Parquet file: .*")


def test_a_file_with_a_hole_in_it(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"label": [n % 3 for n in range(5000)], "n": range(5000)})
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    refused(path, ", row 0: .*")


def test_where_pyarrow_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = r"reading Parquet needs pyarrow, .*`pip install 'stepfuse\[parquet\]'`"
    with pytest.raises(BackendUnavailable, match=line):
        index(written(tmp_path, "a.parquet", b"PAR1"), NAMES, tmp_path / "idx")
