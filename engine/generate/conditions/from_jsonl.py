"""Rows of JSON Lines: one object in each line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from stepfuse.engine.generate.conditions.records import Blanks, Lines, Record, Start


class JsonLines:
    """Objects of any keys. NaN and infinity, which Python takes for JSON, are refused."""

    name = "jsonl"
    endings: tuple[str, ...] = (".jsonl", ".ndjson")
    in_order = True

    def records(self, file: BinaryIO, start: Start | None = None) -> Iterator[Record]:
        """Values are what JSON has."""
        if start is None:
            return _records(Lines(file))
        file.seek(start.mark)
        return islice(_records(Lines(file, start.mark)), start.skip, None)


def _records(lines: Lines) -> Iterator[Record]:
    blanks = Blanks()
    while True:
        mark = lines.begin()
        text = next(lines, None)
        if text is None:
            return
        if blanks.skips(not text.strip(), lines):
            continue
        try:
            values = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise lines.bad(f"is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise lines.bad(f'must be an object, {{"label": 3}} say; got {text.strip():.100}')
        yield Record(values, mark, lines.number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.100} is there twice")
    return values


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.100} is too large for a number")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_number, parse_constant=_constant
)
