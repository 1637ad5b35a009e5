"""How far a job is, from its folder alone: nothing is loaded, computed or changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from stepfuse.engine.files.writing import temporaries
from stepfuse.engine.generate import claims, shards
from stepfuse.engine.generate.job import SHARDS, Job
from stepfuse.engine.generate.machine import short
from stepfuse.engine.generate.place import A_FOLDER, LEASE, LocalPlace, Place
from stepfuse.engine.generate.record import FOLDER as RECORDS
from stepfuse.engine.generate.record import Record


@dataclass
class Machine:
    """Machines of one fingerprint, whose images agree byte for byte.

    Attributes:
        name: eight letters for it.
        fingerprint: see ``machine.fingerprint``.
        shards: that they have made.
        hosts: their names, and how many shards each has made.
    """

    name: str
    fingerprint: dict[str, str]
    shards: int = 0
    hosts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """What is there of a job.

    Attributes:
        url: of the job.
        images, shards: that the whole job has.
        images_done, shards_done: whose records and shards are in place.
        moved: records whose shard is not there, or has another size.
        bytes: of the shards that are done.
        seconds: that workers took for them, added up.
        writer_wait: of these, seconds in which the writer held up the sampler.
        at_work: workers that are making a shard now, as far as the folder shows.
        abandoned: temporary names that nobody will finish; the next run removes them.
        failed: the last error of the shards that have failed, by their numbers.
        machines: who has made what, most shards first.
        conditions: what decides the rows, as in job.json.
    """

    url: str
    images: int
    images_done: int
    shards: int
    shards_done: int
    moved: int
    bytes: int
    seconds: float
    writer_wait: float
    at_work: int
    abandoned: int
    failed: dict[int, str]
    machines: list[Machine]
    conditions: dict[str, Any]

    @property
    def images_per_s(self) -> float:
        """Of one worker, the mean over everything that is done; 0 where nothing is."""
        return self.images_done / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds that those who are at work need for the rest; None where nobody knows."""
        rate = self.images_per_s * self.at_work
        return (self.images - self.images_done) / rate if rate > 0 else None

    @property
    def differing(self) -> list[str]:
        """The parts of the fingerprint in which the machines are not alike."""
        names = sorted({name for machine in self.machines for name in machine.fingerprint})
        return [
            name
            for name in names
            if len({machine.fingerprint.get(name) for machine in self.machines}) > 1
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            **asdict(self),
            "images_per_s": self.images_per_s,
            "eta": self.eta,
            "differing": self.differing,
        }


def status(job: Job, records_only: bool = False) -> Status:
    """Look at every record once; one is in memory at a time.

    With ``records_only`` nobody looks for the shards, which may have been moved away.
    """
    sizes = {} if records_only else job.place.sizes(SHARDS)
    found = _Sums()
    moved = 0
    done = bytearray(len(job.shards))
    for record in job.records():
        there = sizes.get(shards.name(record.shard) + job.format.ending)
        if records_only or there in (record.bytes, A_FOLDER):
            found.add(record)
            done[record.shard] = 1
        else:
            moved += 1
    at_work, abandoned = _temporary(job.place)
    return Status(
        url=job.place.url,
        images=job.n,
        images_done=found.images,
        shards=len(done),
        shards_done=sum(done),
        moved=moved,
        bytes=found.bytes,
        seconds=found.seconds,
        writer_wait=found.writer_wait,
        at_work=at_work or _claimed(job.place),
        abandoned=abandoned,
        failed={k: str(told["error"]) for k, told in job.failures().items() if not done[k]},
        machines=sorted(found.machines.values(), key=lambda machine: -machine.shards),
        conditions=job.identity["conditions"],
    )


class _Sums:
    """Over records."""

    def __init__(self) -> None:
        self.images = self.bytes = 0
        self.seconds = self.writer_wait = 0.0
        self.machines: dict[tuple[tuple[str, str], ...], Machine] = {}

    def add(self, record: Record) -> None:
        """One more."""
        self.images += record.count
        self.bytes += record.bytes
        self.seconds += record.seconds
        self.writer_wait += record.writer_wait
        key = tuple(sorted(record.fingerprint.items()))
        machine = self.machines.get(key)
        if machine is None:
            machine = Machine(short(record.fingerprint), record.fingerprint)
            self.machines[key] = machine
        machine.shards += 1
        machine.hosts[record.host] = machine.hosts.get(record.host, 0) + 1


def _temporary(place: Place) -> tuple[int, int]:
    """Shards that are being written, and names of any kind that nobody will finish."""
    if not isinstance(place, LocalPlace):
        return 0, 0
    writing = abandoned = 0
    for folder in ("", SHARDS, RECORDS):
        for _, alive in temporaries(place.folder / folder, LEASE):
            writing += alive and folder == SHARDS
            abandoned += not alive
    return writing, abandoned


def _claimed(place: Place) -> int:
    """Shards that somebody is at; the making of a job is claimed, too, under a name of its own."""
    return sum(shards.number(name) is not None for name in claims.held(place))
