"""Images that are made once more, and how they compare with those that are there."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepfuse.engine.generate.conditions.batches import Batch, batches
from stepfuse.engine.generate.conditions.row import Row
from stepfuse.engine.generate.crew import resolve_device
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.machine import fingerprint, short
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.worker import Worker

_SMALLEST, _ROUGH = 60.0, 35.0  # dB between two kinds of machines
_PEAK = {"pixels": 255.0, "samples": 2.0}


@dataclass(frozen=True)
class Comparison:
    """One image that was made again.

    Attributes:
        n: its number.
        what: differs, in words; empty where nothing does.
        decibels: of the decoded images; None where their bytes were compared.
        unread: whether there was nothing to compare it with.
    """

    n: int
    what: str = ""
    decibels: float | None = None
    unread: bool = False


class Remaker:
    """Makes images of a job again, with a network that is loaded when the first one is wanted.

    Raises ValueError where the model or the conditions are not those of the job any more.
    """

    def __init__(self, job: Job, device: str = "auto") -> None:
        self.job = job
        self.device = torch.device(
            resolve_device(job.identity["device"] if device == "auto" else device)
        )
        self.here = fingerprint(self.device, job.settings.threads or 1, job.format.libraries())
        self.limit = limit(job)
        job.conditions.rows(0, 1)
        self._source = job.source
        self._worker: Worker | None = None

    @property
    def worker(self) -> Worker:
        """Loaded."""
        if self._worker is None:
            job = self.job
            self._worker = Worker(job.settings, self._source, self.device, job.timings)
        return self._worker

    def of(self, record: Record, wanted: Collection[int]) -> Remade:
        """What is made again of a shard: the batches with the ``wanted`` images."""
        size = self.job.settings.batch_size or 1
        rows = self.job.conditions.rows(record.first, record.count + size - 1)
        needed = [
            batch
            for batch in batches(rows[: record.count], record.first, size)
            if any(n in wanted for n in batch.kept)
        ]
        return Remade(self, record, rows, needed)


@dataclass
class Remade:
    """Batches of one shard, to be made again once the shard has been read.

    Of the images that are read as much is kept as will be needed: a hash, or all of their bytes
    where another kind of machine has made them.
    """

    remaker: Remaker
    record: Record
    rows: list[Row]
    needed: list[Batch]
    kept: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.foreign = self.record.fingerprint != self.remaker.here
        self.wanted = {n for batch in self.needed for n in batch.kept}
        self.sums = self.record.checksums()

    def keep(self, n: int, content: bytes) -> None:
        """An image of the shard, as it was read."""
        if n in self.wanted:
            self.kept[n] = content if self.foreign else _hash(content)

    def compare(self) -> Iterator[Comparison]:
        """Make the batches, and say how every image of them compares with what was kept.

        Where nothing was kept the checksum of the record has to do.
        """
        for batch in self.needed:
            for made in self.remaker.worker.batch(batch, self.rows, self.record.first):
                yield self._similar(made) if self.foreign else self._same(made)

    def _same(self, made: Made) -> Comparison:
        encoded = self.remaker.job.format.encode(made)
        there = self.kept.pop(made.n, None)
        if there is None:
            equal = zlib.crc32(encoded) == self.sums[made.n - self.record.first]
        else:
            equal = there == _hash(encoded)
        what = f"made again on a machine like that of its record ({short(self.remaker.here)})"
        return Comparison(made.n, "" if equal else f"{what}, it has other bytes")

    def _similar(self, made: Made) -> Comparison:
        job = self.remaker.job
        there = self.kept.pop(made.n, None)
        if there is None:
            return Comparison(made.n, unread=True)
        channels, height, width = job.identity["sample_shape"]
        shape = channels, height, width
        try:
            old = job.format.decode(there, shape)
        except ValueError as error:
            return Comparison(made.n, f"cannot be decoded: {error}")
        # both are decoded, since JPEG loses a little of either
        new = job.format.decode(job.format.encode(made), shape)
        decibels = psnr(old, new, _PEAK[job.format.takes])
        if decibels >= self.remaker.limit:
            return Comparison(made.n, decibels=decibels)
        return Comparison(
            made.n,
            f"{decibels:.1f} dB from what is made here, on another kind of machine; "
            f"{self.remaker.limit:g} dB are expected",
        )


def limit(job: Job) -> float:
    """The least PSNR, dB, of one image made on two kinds of machines.

    A grey level that differs in JPEG may change a coefficient, and with it 64 pixels.
    """
    output = job.identity["output"]
    rough = job.settings.recipe.optimize == "bfloat16" or output.get("image") == "jpeg"
    return _ROUGH if rough else _SMALLEST


def psnr(a: NDArray[Any], b: NDArray[Any], peak: float) -> float:
    """10 log10(peak^2 / mean (a - b)^2), dB; infinite for equal arrays."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return 10 * math.log10(peak * peak / error) if error else math.inf


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
