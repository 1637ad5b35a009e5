"""Parquet files whose pictures `datasets` of Hugging Face shows as images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from stepfuse.engine.generate.arrow import arrow
from stepfuse.engine.generate.formats.encode import Encoder, Png
from stepfuse.engine.generate.formats.format import (
    NO_CLASS,
    canonical_json,
    counted,
    damaged,
    json_line,
    numbered,
)
from stepfuse.engine.generate.formats.pictures import Pictures
from stepfuse.engine.generate.made import Made

# A row group is held in memory, by us and by whoever reads one image of it.
ROWS = 1000
BYTES = 32 << 20
_PURPOSE = "format parquet"


@dataclass(frozen=True)
class Parquet(Pictures):
    """A column ``image``, struct {bytes, path}; ``label``, int64, where the model has classes, and
    ``extra``, the further values as a JSON string. "No class" and "nothing further" are null.

    Nothing is compressed, since pictures are; every page has a check sum.
    """

    name: ClassVar[str] = "parquet"
    ending: ClassVar[str] = ".parquet"
    encoder: Encoder = field(default_factory=Png)

    def libraries(self) -> dict[str, str]:
        """Those of the encoder, and pyarrow, which writes its version into the file."""
        version = str(arrow(_PURPOSE).__version__)
        return {**super().libraries(), "pyarrow": version}

    def check(self) -> None:
        """Raise `BackendUnavailable` where pyarrow is missing."""
        arrow(_PURPOSE, "pyarrow.parquet")

    def write(self, path: Path, encoded: Iterable[tuple[Made, bytes]], count: int) -> None:
        """Make the file ``path``. Raises ValueError where only some images have a label."""
        parquet = arrow(_PURPOSE, "pyarrow.parquet")
        images = counted(encoded, count)
        head = next(images)
        labelled = head[0].label is not None
        schema = _schema(labelled)
        with (
            path.open("xb") as file,
            parquet.ParquetWriter(
                file,
                schema,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            ) as writer,
        ):
            for group in _groups(chain([head], images)):
                rows = [self._row(made, content, labelled) for made, content in group]
                table = arrow(_PURPOSE).Table.from_pylist(rows, schema=schema)
                writer.write_table(table, row_group_size=len(rows))

    def _row(self, made: Made, content: bytes, labelled: bool) -> dict[str, Any]:
        if (made.label is not None) != labelled:
            others = "others have one" if labelled else "others have none"
            raise ValueError(
                f"all images must have a label or none: image {made.n} has {made.label}, {others}"
            )
        row: dict[str, Any] = {
            "image": {"bytes": content, "path": self._file(made.n)},
            "extra": canonical_json(made.extra, made.n) if made.extra else None,
        }
        if made.label is not None:
            row["label"] = None if made.label == NO_CLASS else int(made.label)
        return row

    def _file(self, n: int) -> str:
        return f"{numbered(n)}{self.encoder.suffix}"

    def entries(self, path: Path, first: int) -> Iterator[tuple[int, bytes]]:
        """The pictures, a row group at a time."""
        for n, image in _cells(path, first, "image"):
            found = image.get("path") if isinstance(image, dict) else image
            if found != self._file(n) or not isinstance(image.get("bytes"), bytes):
                raise damaged(path, n, f"{found!r} is in its place")
            yield n, image["bytes"]

    def labels(self, path: Path, first: int) -> Iterator[int]:
        """The column ``label``; -1 for null, and for every image where it is missing."""
        for n, label in _cells(path, first, "label"):
            if not isinstance(label, int | None):
                raise damaged(path, n, f"its label is {label!r}")
            yield NO_CLASS if label is None else int(label)


def _schema(labelled: bool) -> Any:
    pyarrow = arrow(_PURPOSE)
    fields = {
        "image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        **({"label": pyarrow.int64()} if labelled else {}),
        "extra": pyarrow.string(),
    }
    features: dict[str, dict[str, str]] = {
        "image": {"_type": "Image"},
        **({"label": {"dtype": "int64", "_type": "Value"}} if labelled else {}),
        "extra": {"dtype": "string", "_type": "Value"},
    }
    metadata = {"huggingface": json_line({"info": {"features": features}})}
    return pyarrow.schema(list(fields.items()), metadata)


def _groups(images: Iterable[tuple[Made, bytes]]) -> Iterator[list[tuple[Made, bytes]]]:
    """The images of a row group each: at most ROWS, and no more than BYTES but for the last."""
    group: list[tuple[Made, bytes]] = []
    size = 0
    for made, content in images:
        group.append((made, content))
        size += len(content)
        if len(group) == ROWS or size >= BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _cells(path: Path, first: int, column: str) -> Iterator[tuple[int, Any]]:
    """The values of a column, None for every row where there is no such column."""
    n = first
    with _blaming(path, first, None):
        file = arrow(_PURPOSE, "pyarrow.parquet").ParquetFile(path, page_checksum_verification=True)
    with file:
        there = column in file.schema_arrow.names
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            with _blaming(path, n, n + rows - 1):
                values = file.read_row_group(group, columns=[column])[column] if there else None
            for row in range(rows):
                yield n, None if values is None else values[row].as_py()
                n += 1


@contextlib.contextmanager
def _blaming(path: Path, first: int, last: int | None) -> Iterator[None]:
    """What pyarrow raises for a damaged file names it, and the images that cannot be read."""
    try:
        yield
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        where = f"image {first}" + ("" if last == first else f" and those up to {last}")
        if last is None:
            where = f"image {first} and those after it"
        raise ValueError(f"{path}: {where} cannot be read: {error}") from error
