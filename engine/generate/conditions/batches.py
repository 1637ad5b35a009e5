"""Which images of a shard are made together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from stepfuse.engine.generate.conditions.row import Row
from stepfuse.kernels.checks import as_integer


@dataclass(frozen=True)
class Batch:
    """Images of one call of the sampler.

    Attributes:
        numbers: of the images, as many as every other batch has.
        keep: how many of them, from the first on, are wanted; the rest fills up the batch.
        guidance: scale of all of them; None for the job's.
    """

    numbers: tuple[int, ...]
    keep: int
    guidance: float | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the wanted images."""
        return self.numbers[: self.keep]


def batches(rows: Sequence[Row], first: int, batch_size: int) -> list[Batch]:
    """Cut images first .. first+len(rows)-1 into batches of one size, every image in one of them.

    Without a guidance of their own the images follow each other, and the last batch is filled up
    with those that come after. With one they are sorted by it, those of the job's guidance first
    and equal ones by number, since the scale is the same for a whole batch; a batch that is not
    full repeats its last image, so that nothing but the shard is needed.
    """
    if as_integer("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    count = len(rows)
    if all(row.guidance is None for row in rows):
        return [
            Batch(tuple(range(first + at, first + at + batch_size)), min(batch_size, count - at))
            for at in range(0, count, batch_size)
        ]
    found = []
    # sorting is stable: equal ones stay in the order of their numbers
    order = sorted(range(count), key=lambda k: _order(rows[k]))
    for guidance, group in groupby(order, key=lambda k: rows[k].guidance):
        numbers = [first + k for k in group]
        for at in range(0, len(numbers), batch_size):
            part = numbers[at : at + batch_size]
            filler = [part[-1]] * (batch_size - len(part))
            found.append(Batch((*part, *filler), len(part), guidance))
    return found


def _order(row: Row) -> tuple[bool, float]:
    return row.guidance is not None, row.guidance or 0.0
