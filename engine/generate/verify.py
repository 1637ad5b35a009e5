"""Whether the images of a job are there, as they were made, and as they would be made again.

Every shard is read and compared with its record; some images, or all, are made anew and compared
with what is there.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from stepfuse.engine.generate import record as records
from stepfuse.engine.generate import shards
from stepfuse.engine.generate.job import SHARDS, Job
from stepfuse.engine.generate.outcome import COMPLETE, DIFFERS, POISONED
from stepfuse.engine.generate.reading import Difference, read_shard
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.remake import Remaker

KEPT = 1000  # differences that are described; all are counted


@dataclass
class Verified:
    """What came of it.

    Attributes:
        images, shards: that are in place, and were read; with ``records_only``, that records say.
        missing: numbers of the shards that are not there.
        equal: images that were made again with the same bytes.
        alike: images that were made again on another kind of machine, and agree.
        worst: of these, dB.
        unread: images that could not be compared: of another kind of machine, and not here.
        differences: the first of them.
        found: how many there are.
    """

    images: int = 0
    shards: int = 0
    missing: list[int] = field(default_factory=list)
    equal: int = 0
    alike: int = 0
    worst: float = float("inf")
    unread: int = 0
    differences: list[Difference] = field(default_factory=list)
    found: int = 0

    @property
    def status(self) -> int:
        """0 where everything is right, 4 where anything differs, 3 where shards are missing."""
        if self.found:
            return DIFFERS
        return POISONED if self.missing else COMPLETE

    def note(self, difference: Difference) -> None:
        """One more."""
        self.found += 1
        if len(self.differences) < KEPT:
            self.differences.append(difference)


def verify(
    job: Job,
    count: int = 64,
    *,
    full: bool = False,
    records_only: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> Verified:
    """Compare every shard with its record, and ``count`` images with what is made now.

    The records must cover the images 0 .. n-1, each once; sizes, hashes and the checksum of every
    image must be theirs. Of the images that are there ``count`` are drawn and made again, each with
    its whole batch, as many as that has. On a machine of the record's fingerprint they must have
    the same bytes. On others the decoded images must agree: their peak signal-to-noise ratio must
    be 60 dB at least, 35 dB with bfloat16 and for JPEG.

    Args:
        full: make all of them again.
        records_only: read no shard; what is made again is compared with the records' checksums.
        seed: of the drawing.
        device: that makes them, "auto" for the job's.
        progress: show a bar.

    Raises ValueError where images are to be made and the model or the conditions are not there any
    more, or are others.
    """
    if count < 0:
        raise ValueError(f"-k must be at least 0; got {count}")
    result = Verified()
    present = _present(job, result, records_only)
    images = sum(job.shards.span(k)[1] for k in present)
    drawn = {} if full else _drawn(job, present, min(count, images), seed)
    remaker = Remaker(job, device) if present and (full or drawn) else None
    total = images * (not records_only) + (images if full else min(count, images))
    with tqdm(total=total, unit="image", disable=not progress, leave=False) as bar:
        for k in present:
            record = job.record(k)
            if record is None:  # since we looked
                result.missing.append(k)
                continue
            wanted: Collection[int] = range(record.first, record.first + record.count)
            wanted = wanted if full else drawn.get(k, ())
            for difference in _shard(job, record, wanted, remaker, records_only, result, bar):
                result.note(difference)
            result.shards += 1
            result.images += record.count
    return result


def _shard(
    job: Job,
    record: Record,
    wanted: Collection[int],
    remaker: Remaker | None,
    records_only: bool,
    result: Verified,
    bar: tqdm,
) -> Iterator[Difference]:
    again = remaker.of(record, wanted) if remaker is not None and wanted else None
    keep = None if again is None else again.keep
    named = set()
    if not records_only:
        with job.place.fetched(job.shard_name(record.shard)) as path:
            for difference in read_shard(job.format, path, record, keep):
                named.add(difference.n)
                yield difference
        bar.update(record.count)
    if again is None:
        return
    for comparison in again.compare():
        bar.update(comparison.n in wanted)
        if comparison.n in named:
            continue
        if comparison.unread:
            result.unread += 1
        elif comparison.what:
            yield Difference(comparison.n, record.shard, comparison.what)
        elif comparison.decibels is None:
            result.equal += 1
        else:
            result.alike += 1
            result.worst = min(result.worst, comparison.decibels)


def _present(job: Job, result: Verified, records_only: bool) -> list[int]:
    """The shards whose records and files are there; what is wrong with others is noted."""
    names = job.place.sizes(records.FOLDER)
    sizes = {} if records_only else job.place.sizes(SHARDS)
    present = []
    for k in job.shards:
        name = shards.name(k)
        found = _look(job, k) if f"{name}.json" in names else None
        if isinstance(found, str):
            result.note(Difference(None, k, found))
        elif found and (records_only or f"{name}{job.format.ending}" in sizes):
            present.append(k)
        else:
            result.missing.append(k)
    for name in sorted(names):
        other = shards.number(name)
        if other is not None and other >= len(job.shards) and name.endswith(".json"):
            what = f"records/{name}: the job has {len(job.shards)} shards"
            result.note(Difference(None, other, what))
    return present


def _look(job: Job, k: int) -> bool | str:
    """Whether there is a record of shard k that fits; in words where it should not be there."""
    name = job.record_name(k)
    try:
        record = Record.from_json(job.place.read(name))
        record.checksums()
    except FileNotFoundError:
        return False
    except ValueError as error:
        return f"{name}: {error}"
    first, count = job.shards.span(k)
    if (record.shard, record.first) == (k, first) and record.count <= count:
        return record.count == count  # fewer: the number of images was raised since
    return (
        f"{name} is of images {record.first} .. {record.first + record.count - 1}; expected "
        f"{first} .. {first + count - 1}"
    )


def _drawn(job: Job, present: list[int], count: int, seed: int) -> dict[int, set[int]]:
    """``count`` of the images of these shards, by shard."""
    size = job.shards.size
    found: dict[int, set[int]] = {}
    if not count:
        return found
    total = (len(present) - 1) * size + job.shards.span(present[-1])[1]
    for at in random.Random(seed).sample(range(total), count):
        k = present[at // size]
        found.setdefault(k, set()).add(k * size + at % size)
    return found
