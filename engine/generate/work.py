"""The one way to make a shard, whoever asks: `todo` says which, `run_shard` makes one.

    job = open_job("run/")
    for k in todo(job):
        run_shard(job, k)

Both may be called anywhere at any time, by as many as like to: a shard that is made twice has the
same bytes, and takes its own place.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stepfuse.engine.files.owners import host
from stepfuse.engine.generate import record as records
from stepfuse.engine.generate.crew import choose_encoders
from stepfuse.engine.generate.encoders import Encoders
from stepfuse.engine.generate.features import Moments
from stepfuse.engine.generate.formats.format import Format
from stepfuse.engine.generate.formats.pictures import Pictures
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.machine import fingerprint
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.pipeline import Written, write_shard
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.worker import Worker
from stepfuse.kernels.arguments import check_callable, check_kind
from stepfuse.kernels.checks import as_device, as_integer, check_flag

_CHUNK = 1 << 20
_MOST_ENCODERS = 256
_workers: dict[tuple[str, str], Worker] = {}
_encoders: dict[tuple[Format, int], Encoders] = {}
_turn = threading.Lock()


def todo(job: Job, records_only: bool = False) -> list[int]:
    """Numbers of the shards that are not done, in order; see `Job.done`."""
    check_kind("job", job, Job, "a Job, from open_job")
    check_flag("records_only", records_only)
    return [k for k, done in enumerate(job.done(records_only)) if not done]


def run_shard(
    job: Job,
    k: int,
    *,
    attempt: int = 1,
    device: str | torch.device = "cpu",
    allow_other_isa: bool = False,
    made: Callable[[int], Any] | None = None,
    encoders: int | None = None,
) -> Record:
    """Make shard k and say what came of it; a shard that is done is not made again.

    The shard is put in place, then its record, each whole or not at all. The network is loaded by
    the first call in a process and kept for the next.

    Args:
        attempt: noted in the record.
        device: where the network runs.
        allow_other_isa: go on where instruction set or versions are not those of the job; the
            images may differ in the last bits then.
        made: called with the number of images that were finished, several times.
        encoders: processes beside this one that encode pictures, kept for the next call; None for
            none on a CPU and, on CUDA, for the cores that fall to the GPU.

    Raises IndexError for a number that is none, ValueError where the weights, the plan or this
    machine are not those of the job, OSError where nothing can be written, and whatever the network
    raises.
    """
    check_kind("job", job, Job, "a Job, from open_job")
    k, attempt = as_integer("k", k), as_integer("attempt", attempt)
    check_flag("allow_other_isa", allow_other_isa)
    if made is not None:
        check_callable("made", made, "a function of the number of images")
    if encoders is not None:
        encoders = as_integer("encoders", encoders)
        if not 0 <= encoders <= _MOST_ENCODERS:
            raise ValueError(f"encoders must be in 0..{_MOST_ENCODERS}; got {encoders}")
    if attempt < 1:
        raise ValueError(f"attempt must be at least 1; got {attempt}")
    device = as_device("device", device)
    first, count = job.shards.span(k)
    done = job.is_done(k)
    if done is not None:
        return done
    start = time.perf_counter()
    with _turn:
        worker = worker_of(job, device, allow_other_isa)
        fill = worker.settings.batch_size or 1
        rows = job.conditions.rows(first, count + fill - 1)
        moments = Moments.of(job.settings.features)

        def watch(batch: Sequence[Made]) -> None:
            if moments is not None:
                moments.add(batch)
            if made is not None:
                made(len(batch))

        with job.place.staged(job.shard_name(k)) as path:
            images = worker.images(rows, first, count)
            with _encoding(job, device, encoders) as helpers:
                written = write_shard(job.format, path, images, count, watch, helpers)
            size, sha256 = measured(path)
    if moments is not None:
        job.place.write(moments.name(k), moments.content())
    return _finish(job, k, size, sha256, written, worker, time.perf_counter() - start, attempt)


def _finish(
    job: Job,
    k: int,
    size: int,
    sha256: str,
    written: Written,
    worker: Worker,
    seconds: float,
    attempt: int,
) -> Record:
    first, count = job.shards.span(k)
    record = Record(
        shard=k,
        first=first,
        count=count,
        bytes=size,
        sha256=sha256,
        fingerprint=fingerprint(worker.device, job.settings.threads or 1, job.format.libraries()),
        host=host(),
        seconds=round(seconds, 3),
        writer_wait=round(written.waited, 3),
        attempt=attempt,
        crc32=records.pack(written.checksums),
    )
    job.place.write(job.record_name(k), record.to_json())
    job.place.remove(job.failed_name(k))
    return record


def worker_of(job: Job, device: torch.device, allow_other_isa: bool = False) -> Worker:
    """The loaded network of a job; the same one as long as this process makes no other job."""
    key = job.sha256, str(device)
    if key not in _workers:
        check_machine(job, allow_other_isa)
        _workers.clear()  # two networks in memory are one too many
        _workers[key] = Worker(job.settings, job.source, device, job.timings)
    return _workers[key]


@contextlib.contextmanager
def _encoding(job: Job, device: torch.device, count: int | None) -> Iterator[Encoders | None]:
    """The processes that encode for a job, kept as long as nothing goes wrong with them."""
    if count is None:
        count = choose_encoders(device)
    if count == 0 or not isinstance(job.format, Pictures):  # other formats only copy
        yield None
        return
    key = job.format, count
    if key not in _encoders:
        _end_encoders()
        _encoders[key] = Encoders(*key)
    try:
        yield _encoders[key]
    except BaseException:
        _end_encoders()
        raise


def _end_encoders() -> None:
    while _encoders:
        _encoders.popitem()[1].end()


def forget() -> None:
    """Free the network that `run_shard` keeps in this process, and let its encoders end."""
    with _turn:
        _workers.clear()
        _end_encoders()


def check_machine(job: Job, allow_other_isa: bool = False) -> None:
    """Raise ValueError where instruction set or versions are not those that the job began with."""
    found = job.timings.differences()
    if found and not allow_other_isa:
        words = "; ".join(f"{name} {there} there, {here} here" for name, (there, here) in
                          found.items())  # fmt: skip
        raise ValueError(
            f"images of {job.place.url} would differ in their last bits on this machine: {words}. "
            "--allow-other-isa makes them all the same; the records will tell"
        )


def note_failure(job: Job, k: int, error: str, attempts: int, trace: str = "") -> None:
    """Write failed/NNNNNN.json: what was raised, where, and how often it was tried."""
    first, count = job.shards.span(k)
    content = {
        "shard": k,
        "first": first,
        "count": count,
        "error": error,
        "traceback": trace,
        "host": host(),
        "attempts": attempts,
    }
    job.place.write(job.failed_name(k), (json.dumps(content, indent=1) + "\n").encode())


def measured(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of a file; of a folder, of its files' names and hashes, in order."""
    if not path.is_dir():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for chunk in iter(functools.partial(file.read, _CHUNK), b""):
                digest.update(chunk)
        return path.stat().st_size, digest.hexdigest()
    total, digest = 0, hashlib.sha256()
    for file_path in sorted(path.iterdir()):
        size, inner = measured(file_path)
        total += size
        digest.update(f"{file_path.name} {inner}\n".encode())
    return total, digest.hexdigest()
