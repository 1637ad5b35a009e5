"""Which images a shard holds. Nothing here counts through images: a job may have 10^8 of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DIGITS = 6  # of a shard's number, and more where it has more


@dataclass(frozen=True)
class Shards:
    """Images 0 .. n-1 in shards of ``size``; the last one may be shorter."""

    n: int
    size: int

    def __len__(self) -> int:
        return -(-self.n // self.size)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def span(self, k: int) -> tuple[int, int]:
        """(first image, count) of shard k; IndexError where there is none of that number."""
        if not 0 <= k < len(self):
            raise IndexError(f"shard k must be in 0 .. {len(self) - 1}; got {k}")
        first = k * self.size
        return first, min(self.size, self.n - first)


def name(k: int) -> str:
    """The name of shard k without an ending: 000123."""
    return f"{k:0{DIGITS}d}"


def number(file: str) -> int | None:
    """The number of the shard whose file, or record, has that name; None for other names."""
    stem = file.partition(".")[0]
    return int(stem) if len(stem) >= DIGITS and stem.isdecimal() else None
