"""What the suites wrote, as rows of a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepfuse.bench.record import SCHEMA, Timing, load
from stepfuse.engine.files.reading import read_text

OURS = "stepfuse"


def read(path: Path) -> list[Timing]:
    """The benchmarks of a file: of pytest-benchmark, or of a record that holds suites.

    Each benchmark is a group of two, ours and its reference. ValueError says what is wrong with the
    file; OSError where it cannot be read.
    """
    try:
        document = json.loads(read_text(path, "a file of the suites"))
        if isinstance(document, dict) and document.get("schema") == SCHEMA:
            return load(path).suite
        return [timing for row in document["benchmarks"] for timing in _pair(row)]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no file of the suites ({type(error).__name__}: {error}); accepted: what "
            "`pytest bench --benchmark-only --benchmark-json FILE` writes, and records of `make "
            "bench`"
        ) from error


def _pair(row: Mapping[str, Any]) -> list[Timing]:
    extra, seconds = row["extra_info"], {OURS: row["stats"]["data"]}
    seconds[extra["reference"]] = extra["reference_seconds"]
    file, _, test = row["fullname"].rpartition("/")[2].partition(".py::")
    kind, _, what = file.partition("_")
    return [
        Timing(
            suite=what if kind == "suite" else "kernels",
            group=test.removeprefix("test_"),
            name=name,
            reference=extra["reference"],
            dtype=extra["dtype"],
            parameters={"group": row["group"], "case": str(extra.get("case", row["param"]))},
            bytes=extra.get("traffic_bytes"),
            seconds=[float(s) for s in samples],
        )
        for name, samples in seconds.items()
    ]
