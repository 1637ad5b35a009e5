"""What a job would take, from a trial of seconds; nothing is counted through or written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stepfuse.engine.generate.create import chosen, prepared, try_out
from stepfuse.engine.generate.crew import choose_crew
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.trial import LOOK, Tried
from stepfuse.engine.generate.words import many, size


@dataclass(frozen=True)
class Estimate:
    """One machine, and all of its workers.

    Attributes:
        images: of the job.
        batch_size, shard_size, shards: that it would have.
        workers: on this machine.
        images_per_s: of one of them.
        bytes: that would be written.
    """

    images: int
    batch_size: int
    shard_size: int
    shards: int
    workers: int
    images_per_s: float
    bytes: float

    @property
    def hours(self) -> float:
        """On this machine, if workers do not slow each other down."""
        return self.images / (self.images_per_s * self.workers) / 3600

    def lines(self, price_per_hour: float | None = None) -> list[tuple[str, str]]:
        """Names and values to print."""
        found = [
            ("images", f"{self.images:,} in {many(self.shards, 'shard')} of {self.shard_size:,}"),
            ("batch", f"{self.batch_size} images at a time"),
            (
                "speed",
                f"{self.images_per_s * self.workers:.3g} images/s: {many(self.workers, 'worker')}, "
                f"{self.images_per_s:.3g} each",
            ),
            ("time", f"{self.hours:,.2f} hours"),
            ("size", size(self.bytes)),
        ]
        if price_per_hour is not None:
            found.append(("price", f"{self.hours * price_per_hour:,.2f}"))
        return found


def estimated(
    settings: Settings,
    n: int,
    workers: int | None = None,
    memory: int | None = None,
    tell: Callable[[Tried], Any] = lambda tried: None,
) -> Estimate:
    """The estimate; raises as `create` does.

    Its trial is a `LOOK`: it ends where twice the images at a time gained less than an eighth, or
    where more would take a process of less than 300 MB beyond that, and so may name a smaller batch
    than the job would have, whose images per second are nearly the same.
    """
    with prepared(settings, n) as ready:
        found = try_out(ready, n, memory, tell, LOOK)
        settled = chosen(ready, n, found, workers)
    crew = choose_crew(ready.device, settled.threads or 1, workers, found.peak_bytes)
    assert settled.shard_size is not None
    return Estimate(
        images=n,
        batch_size=found.batch_size,
        shard_size=settled.shard_size,
        shards=math.ceil(n / settled.shard_size),
        workers=len(crew),
        images_per_s=found.images_per_s,
        bytes=found.bytes_per_image * n,
    )
