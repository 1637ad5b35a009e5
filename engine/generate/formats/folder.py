"""A shard that is a folder of pictures, ``000000000123.png``, and what is written beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from stepfuse.engine.generate.formats.encode import Encoder
from stepfuse.engine.generate.formats.format import (
    NO_CLASS,
    canonical_json,
    counted,
    damaged,
    numbered,
)
from stepfuse.engine.generate.formats.pictures import Pictures
from stepfuse.engine.generate.made import Made

METADATA = "metadata.jsonl"  # the name that `datasets` looks for beside pictures


@dataclass(frozen=True)
class Folder(Pictures):
    """Pictures named by their numbers.

    Where an image has a label or an ``extra``, the folder has a file metadata.jsonl, too: a line
    {"extra": {...}, "file_name": "000000000123.png", "label": 3} for every image, whose label is
    null for no class. Whoever reads all pictures of a folder passes over it.
    """

    ending: ClassVar[str] = ""
    encoder: Encoder

    def write(self, path: Path, encoded: Iterable[tuple[Made, bytes]], count: int) -> None:
        """Make the folder ``path``."""
        path.mkdir()
        metadata: BinaryIO | None = None
        first: int | None = None
        with ExitStack() as stack:
            for made, content in counted(encoded, count):
                first = made.n if first is None else first
                with (path / self._file(made.n)).open("xb") as file:
                    file.write(content)
                if metadata is None and (made.label is not None or made.extra):
                    metadata = stack.enter_context((path / METADATA).open("xb"))
                    for n in range(first, made.n):  # which had nothing to say
                        metadata.write(self._line(n, None, {}))
                if metadata is not None:
                    metadata.write(self._line(made.n, made.label, made.extra))

    def _file(self, n: int) -> str:
        return f"{numbered(n)}{self.encoder.suffix}"

    def _line(self, n: int, label: int | None, extra: Any) -> bytes:
        known = None if label is None or label == NO_CLASS else int(label)
        values = {"file_name": self._file(n), "label": known, "extra": dict(extra)}
        return f"{canonical_json(values, n)}\n".encode()

    def entries(self, path: Path, first: int) -> Iterator[tuple[int, bytes]]:
        """The pictures. Raises ValueError for a file that is none of them."""
        for n in self._numbers(path, first):
            yield n, (path / self._file(n)).read_bytes()

    def _numbers(self, path: Path, first: int) -> Iterator[int]:
        names = [file.name for file in path.iterdir() if file.name != METADATA]
        for n, name in enumerate(sorted(names, key=lambda name: (len(name), name)), first):
            if name != self._file(n):
                raise damaged(path, n, f"{name!r} is in its place")
            yield n

    def labels(self, path: Path, first: int) -> Iterator[int]:
        """What metadata.jsonl says; -1 for every image where it is missing."""
        metadata = path / METADATA
        if not metadata.exists():
            yield from (NO_CLASS for _ in self._numbers(path, first))
            return
        with metadata.open("rb") as file:
            for n, line in enumerate(file, first):
                try:
                    values = json.loads(line)
                    if values["file_name"] != self._file(n):
                        raise ValueError(f"{values['file_name']!r} is in its place")
                    label = values["label"]
                    yield NO_CLASS if label is None else int(label)
                except (ValueError, TypeError, KeyError) as error:
                    raise damaged(metadata, n, f"its line: {error!r}") from error
