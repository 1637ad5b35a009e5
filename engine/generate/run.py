"""Making a job: which shards, by whom, and what is said at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from stepfuse.engine.generate import claims, shards
from stepfuse.engine.generate.claims import Claim
from stepfuse.engine.generate.crew import choose_crew, resolve_device
from stepfuse.engine.generate.engines import cluster
from stepfuse.engine.generate.engines.foreman import GRACE
from stepfuse.engine.generate.engines.processes import Processes
from stepfuse.engine.generate.engines.ray import RayActors
from stepfuse.engine.generate.job import MANIFEST, Job
from stepfuse.engine.generate.outcome import COMPLETE, DISK, POISONED, Outcome
from stepfuse.engine.generate.place import LEASE, Place, RemotePlace
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.slices import Slice
from stepfuse.engine.generate.stopping import Stop
from stepfuse.engine.generate.typed import settle
from stepfuse.engine.generate.watching import Begun, Watcher
from stepfuse.engine.generate.words import many, size
from stepfuse.engine.generate.work import check_machine
from stepfuse.kernels.checks import check_word

ENGINES = ("processes", "ray")
MOST_WORKERS = 4096


@dataclass(frozen=True)
class How:
    """How a job is run; nothing of it changes an image.

    Attributes:
        engine: "processes" or "ray".
        workers: processes or actors; chosen where it is None.
        slice: make only these shards.
        steal: then those of others that nobody is at.
        grace: seconds for the shards at hand once a signal has come.
        records_only: trust the records of shards that are no longer there.
        force: go on although the disk seems too small.
        allow_other_isa: go on where instruction set or versions are others.
        address: of a Ray cluster.
        device: "auto" for the job's.
        lease: seconds after which a claim that nobody has touched is nobody's.
    """

    engine: str = "processes"
    workers: int | None = None
    slice: Slice | None = None
    steal: bool = False
    grace: float = GRACE
    records_only: bool = False
    force: bool = False
    allow_other_isa: bool = False
    address: str | None = None
    device: str = "auto"
    lease: float = LEASE

    def __post_init__(self) -> None:
        settle(self)
        check_word("--engine", self.engine, ENGINES)
        if self.workers is not None and not 1 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"--workers must be in 1 .. {MOST_WORKERS}; got {self.workers}")
        if self.address == "":
            raise ValueError("--address must name a cluster, or be 'auto'; got ''")
        if self.grace < 0:
            raise ValueError(f"--grace must be seconds, 0 or more; got {self.grace}")
        if self.steal and self.slice is None:
            raise ValueError(
                "--steal takes shards of others, and needs --shard to say who they are"
            )
        if self.address is not None and self.engine != "ray":
            raise ValueError(f"--address {self.address} is for --engine ray")


class Engine(Protocol):
    """Somebody who makes shards."""

    @property
    def workers(self) -> int:
        """How many workers there will be."""

    def run(self, shards: Iterable[int]) -> Outcome:
        """Make them all, in about this order."""


def run(job: Job, how: How, watcher: Watcher, stop: Stop) -> Outcome:
    """Make what is not done of a job, or of a slice of it; signals are the caller's.

    Raises OSError where nothing can be written, and ValueError where this machine or the settings
    do not fit the job, before a network is loaded.
    """
    check_shared(job.place)
    job.place.check()
    if how.engine == "processes":  # actors of other machines look at their own
        check_machine(job, how.allow_other_isa)
    job.check()
    job.place.clean()
    claims.clean(job.place)
    done = job.done(how.records_only)
    own, others = _shares(done, how)
    if not own and not others:
        return _finished(job, Outcome(), how)
    careful = _Careful(watcher, job, how, len(own) + len(others), stop)
    engine = _engine(job, how, careful, stop)
    careful.begin(_begun(job, done, own, engine.workers))
    try:
        if how.steal:
            with _Taking(job, how.lease) as taking:
                careful.released = taking.release
                outcome = engine.run(taking.of([*own, *others]))
        else:
            outcome = engine.run(own)
        if careful.trouble:
            outcome.status, outcome.reason = DISK, careful.trouble
        return _finished(job, outcome, how)
    finally:
        careful.end()


def _shares(done: bytearray, how: How) -> tuple[list[int], list[int]]:
    waiting = [k for k, there in enumerate(done) if not there]
    if how.slice is None:
        return waiting, []
    return list(how.slice.of(waiting)), list(how.slice.others(waiting)) if how.steal else []


def check_shared(place: Place) -> None:
    """Raise ValueError for a place that no other process sees."""
    if isinstance(place, RemotePlace) and not place.shared:
        raise ValueError(
            f"{place.url} is the memory of this process, which workers do not see; accepted: a "
            "folder, a URL of a store, or run_shard in this process"
        )


def reached(how: How) -> contextlib.AbstractContextManager[None]:
    """Inside, the machines that the engine needs are there, as far as they can be in advance.

    Raises ValueError where they are not: to be asked before a network is loaded.
    """
    if how.engine == "processes":
        return contextlib.nullcontext()
    return cluster.reached(how.address)


def _engine(job: Job, how: How, watcher: Watcher, stop: Stop) -> Engine:
    device = job.identity["device"] if how.device == "auto" else how.device
    if how.engine == "ray":
        return RayActors(
            job,
            device,  # that the machines have, whatever this one has
            watcher,
            stop,
            address=how.address,
            workers=how.workers,
            grace=how.grace,
            allow_other_isa=how.allow_other_isa,
        )
    crew = choose_crew(resolve_device(device), job.settings.threads or 1, how.workers)
    return Processes(job, crew, watcher, stop, grace=how.grace, allow_other_isa=how.allow_other_isa)


def _begun(job: Job, done: bytearray, own: list[int], workers: int) -> Begun:
    waiting = len(done) - sum(done)
    size, last = job.shards.size, job.shards.span(len(done) - 1)[1]

    def images(count: int, with_last: bool) -> int:
        return count * size - (size - last if with_last else 0)

    return Begun(
        url=job.place.url,
        images=job.n,
        shards=len(done),
        images_done=job.n - images(waiting, not done[-1]),
        shards_done=sum(done),
        shards_asked=len(own),
        images_asked=images(len(own), bool(own) and own[-1] == len(done) - 1),
        workers=workers,
        threads=job.settings.threads or 1,
    )


def _finished(job: Job, outcome: Outcome, how: How) -> Outcome:
    """What there is now, whoever has made it; the manifest where that is everything."""
    done = job.done(how.records_only)
    left = len(done) - sum(done)
    job.place.clean()  # also what workers have left that were killed
    claims.clean(job.place)
    if not left:
        write_manifest(job)
        outcome.status, outcome.reason, outcome.failed = COMPLETE, "", {}
    elif outcome.status == COMPLETE and how.slice is None:
        outcome.status = POISONED
        outcome.failed = {k: told["error"] for k, told in job.failures().items()}
    outcome.left = left
    return outcome


def write_manifest(job: Job) -> None:
    """manifest.json: every shard with its size and hash, and one hash of them all, which is a
    function of the job.
    """
    digest, total, listed = hashlib.sha256(), 0, []
    for record in job.records():
        name = shards.name(record.shard) + job.format.ending
        digest.update(f"{name} {record.sha256}\n".encode())
        total += record.bytes
        listed.append([name, record.first, record.count, record.bytes, record.sha256])
    content: dict[str, Any] = {
        "images": job.n,
        "shards": len(listed),
        "bytes": total,
        "sha256": digest.hexdigest(),
        "job": job.sha256,
        "columns": ["name", "first", "count", "bytes", "sha256"],
        "rows": listed,
    }
    job.place.write(MANIFEST, (json.dumps(content) + "\n").encode())


class _Careful:
    """A watcher that looks at the disk after the first shard, and passes everything on."""

    def __init__(self, watcher: Watcher, job: Job, how: How, count: int, stop: Stop) -> None:
        self.watcher, self.job, self.how, self.stop = watcher, job, how, stop
        self.left, self.seen, self.trouble = count, False, ""
        self.released: Callable[[int], None] = lambda k: None
        self.begin, self.up, self.made = watcher.begin, watcher.up, watcher.made
        self.note, self.tick, self.end = watcher.note, watcher.tick, watcher.end

    def shard(self, worker: int, record: Record) -> None:
        """A shard is in place: will the others fit?"""
        self.watcher.shard(worker, record)
        self.released(record.shard)
        self.left -= 1
        if self.seen or self.how.force:
            return
        self.seen = True
        free = self.job.place.free()
        if free is not None and record.bytes * self.left > free:
            self.trouble = (
                f"{self.job.place.url}: {many(self.left, 'shard')} like the first need "
                f"{size(record.bytes * self.left)} and {size(free)} are free; "
                "accepted: more room, or --force"
            )
            self.stop.ask()
            self.stop.ask()

    def failed(self, shard: int, attempt: int, error: str, final: bool) -> None:
        """An attempt has failed."""
        self.watcher.failed(shard, attempt, error, final)
        if final:
            self.released(shard)


class _Taking:
    """Shards that are claimed before they are begun, so that nobody else begins them."""

    def __init__(self, job: Job, lease: float) -> None:
        self.job, self.lease = job, lease
        self.held: dict[int, Claim] = {}
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.beat = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Taking:
        self.beat.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.over.set()
        self.beat.join()
        for k in list(self.held):
            self.release(k)

    def of(self, wanted: Iterable[int]) -> Iterator[int]:
        """Those that nobody has made or is at, each looked at when it is asked for."""
        for k in wanted:
            claim = Claim(self.job.place, shards.name(k), self.lease)
            if self.job.is_done(k) is None and claim.take():
                with self.lock:
                    self.held[k] = claim
                yield k

    def release(self, k: int) -> None:
        """It is made, or given up."""
        with self.lock:
            claim = self.held.pop(k, None)
        if claim is not None:
            claim.release()

    def _beat(self) -> None:
        while not self.over.wait(self.lease / 5):
            with self.lock:
                for claim in self.held.values():
                    claim.touch()
