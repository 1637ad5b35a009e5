"""Counts and sizes as people write them."""

from __future__ import annotations

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def many(number: int, what: str) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(count: float) -> str:
    """Of so many bytes, in the largest unit of which there is one: "49.5 GB"."""
    for bytes_each, unit in _UNITS:
        if count >= bytes_each:
            return f"{count / bytes_each:,.3g} {unit}"
    return many(round(count), "byte")
