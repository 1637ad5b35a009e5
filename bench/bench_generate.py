"""`stepfuse generate` beside the loop it is made of: `python -m stepfuse.bench.bench_generate`.

1. A shard (sampled, encoded, written, hashed, flushed) beside the same batches by `Sampler.sample`
   alone, in turn and in one process; the images of the shard are compared with the loop's first.
2. Two workers of one thread beside one of two threads, by images per second once all are up.
3. The memory of a worker at shard 5 and at shard 50.
4. What `status` and `--dry-run` of a job of 10^8 images take.
"""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import stepfuse as sf
from stepfuse.bench import machine, script
from stepfuse.bench.timing import Turns, Work
from stepfuse.engine.files.images import to_uint8
from stepfuse.engine.generate.api import make
from stepfuse.engine.generate.create import create
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.place import open_place
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.reports.several import Silent
from stepfuse.engine.generate.run import How
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.work import forget, run_shard

BATCH, BATCHES = 8, 4  # images at a time; batches of a shard
STEPS = 50
MANY_SHARDS = 50


def new_job(folder: Path, n: int, threads: int, optimize: str, steps: int = STEPS) -> Job:
    """A job of `digits` whose shards are short."""
    settings = Settings(
        recipe=Recipe(steps=str(steps), optimize=optimize),
        format="webdataset",
        batch_size=BATCH,
        shard_size=BATCH * BATCHES,
        threads=threads,
        device="cpu",
    )
    return create(settings, n, open_place(folder)).job


class Beside:
    """One shard after the other of a job, and the loop that makes the same images."""

    def __init__(self, folder: Path, optimize: str) -> None:
        self.job = new_job(folder, 10**6, torch.get_num_threads(), optimize)
        digits = sf.load("digits")
        self.shape = (BATCH, *digits.sample_shape)
        self.sampler = Recipe(steps=str(STEPS), optimize=optimize).sampler(digits.model, digits)
        self.next = 0

    def loop(self, k: int = 0) -> list[torch.Tensor]:
        """The batches of shard k, sampled and left."""
        first = k * BATCH * BATCHES
        return [
            self.sampler.sample(
                self.shape,
                first_index=start,
                condition={"labels": torch.arange(start, start + BATCH) % 10},
            )
            for start in range(first, first + BATCH * BATCHES, BATCH)
        ]

    def shard(self) -> Record:
        """Another one, that nobody has made."""
        self.next += 1
        return run_shard(self.job, self.next)

    def verify(self) -> None:
        """A shard holds the images of the loop; of compiled networks up to rounding."""
        record = run_shard(self.job, 0)
        path = Path(self.job.place.url, self.job.shard_name(0))
        shape = (self.shape[1], *self.shape[2:])
        found = [self.job.format.decode(e, shape) for _, e in self.job.format.entries(path, 0)]
        expected = torch.cat([to_uint8(x) for x in self.loop()]).movedim(1, -1).numpy()
        assert record.count == len(found) == len(expected)
        assert np.abs(np.stack(found).astype(int) - expected).max() <= 1


def beside_the_loop(rounds: int, optimize: str) -> dict[str, Any]:
    """Seconds of a shard and of the loop alone, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        both = Beside(Path(folder, "run"), optimize)
        turns = Turns(
            {"loop": Work(both.loop, both.verify), "shard": Work(both.shard, both.verify)},
            uncounted=1,
        ).run(rounds)
        forget()
        return {
            "network": optimize,
            "images_per_s_loop": BATCH * BATCHES / turns.median("loop"),
            "images_per_s_shard": BATCH * BATCHES / turns.median("shard"),
            "shard_over_loop": turns.ratio("loop", "shard"),
        }


class Rate(Silent):
    """Images per second from when all workers are up."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers
        self.running: set[int] = set()
        self.times: list[tuple[float, int]] = []

    def up(self, worker: int, running: bool) -> None:
        """A worker is there, or gone."""
        if running:
            self.running.add(worker)
        else:
            self.running.discard(worker)

    def made(self, worker: int, images: int) -> None:
        """Counted while everybody works."""
        if len(self.running) == self.workers:
            self.times.append((time.perf_counter(), images))

    def per_second(self) -> float:
        """The rate."""
        start, end = self.times[0][0], self.times[-1][0]
        return sum(images for _, images in self.times[1:]) / (end - start)


def crews(rounds: int, images: int) -> dict[str, float]:
    """Images per second of two workers of one thread and of one of two, in turn."""
    found: dict[str, list[float]] = {"2 x 1": [], "1 x 2": []}
    for round_ in range(rounds):
        order = list(found)[:: 1 if round_ % 2 == 0 else -1]
        for crew in order:
            workers, threads = map(int, crew.split(" x "))
            with tempfile.TemporaryDirectory() as folder:
                job = new_job(Path(folder, "run"), images, threads, "off")
                rate = Rate(workers)
                outcome = make(job, How(workers=workers), rate)
                assert outcome.status == 0, outcome
                found[crew].append(rate.per_second())
    return {crew: statistics.median(rates) for crew, rates in found.items()}


def memory(shards: int) -> dict[str, float]:
    """Resident MB of this process at shard 5 and at the last, of two steps each."""
    seen: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = new_job(Path(folder, "run"), shards * BATCH * BATCHES, 1, "off", steps=2)
        for k in range(shards):
            run_shard(job, k)
            if k in (5, shards - 1):
                seen[f"shard {k}"] = _resident() / 1e6
    return seen


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# what is started by a large process counts that one's memory as its own until it has begun
_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
found = {"seconds": time.perf_counter() - start, "MB": usage.ru_maxrss / 1024, "status": status}
print(json.dumps(found))
"""


def asked(*words: str) -> dict[str, float]:
    """Seconds and most MB of a command, or of a process that it waits for."""
    command = [sys.executable, "-m", "stepfuse", "generate", *words]
    told = subprocess.run(
        [sys.executable, "-c", _LAUNCHER, *command], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(told.stdout)
    assert found["status"] == 0, words
    return found


@contextlib.contextmanager
def huge_job(records: int) -> Iterator[Path]:
    """A folder that looks like 10^8 images, of which so many shards of a thousand are there."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        settings = Settings(format="npz", batch_size=8, shard_size=1000, threads=1, device="cpu")
        job = create(settings, 10**8, open_place(run)).job
        record = Record(0, 0, 1000, 0, "0" * 64, dict(job.made_with), "host", 100.0, 0.0, 1,
                        "AAAA" * (4000 // 3) + "AA==")  # fmt: skip
        (run / "records").mkdir()
        (run / "shards").mkdir()
        text = json.loads(record.to_json())
        for k in range(records):
            content = {**text, "shard": k, "first": 1000 * k}
            (run / f"records/{k:06d}.json").write_text(json.dumps(content))
            (run / f"shards/{k:06d}.npz").touch()
        yield run


def main(arguments: Sequence[str] | None = None) -> None:
    """Everything, in order."""
    options = script.parser(__doc__, rounds=7)
    options.add_argument("--images", type=int, default=512, help="of a crew's job")
    options.add_argument("--records", type=int, default=100_000, help="of the huge job")
    given = script.parsed(options, arguments)
    torch.set_num_threads(given.threads or 1)
    console: Console = script.console()
    document: dict[str, Any] = {"machine": machine.brief(), "loop": []}
    console.print(f"{machine.caption()}; batches of {BATCH}, {STEPS} steps of digits")
    for optimize in ("off", "float32"):
        found = beside_the_loop(given.rounds, optimize)
        document["loop"].append(found)
        console.print(
            f"network {optimize}: a shard has {100 * found['shard_over_loop']:.1f} % of the "
            f"images/s of the loop ({found['images_per_s_shard']:.3g} of "
            f"{found['images_per_s_loop']:.3g})"
        )
    document["crews"] = found_crews = crews(3, given.images)
    console.print(
        f"two workers of one thread {found_crews['2 x 1']:.3g} images/s, one of two threads "
        f"{found_crews['1 x 2']:.3g}"
    )
    document["memory"] = seen = memory(MANY_SHARDS)
    console.print("memory " + ", ".join(f"at {name} {mb:.0f} MB" for name, mb in seen.items()))
    with huge_job(given.records) as run:
        document["status"] = taken = asked("status", str(run))
        console.print(
            f"status of {given.records:,} records: {taken['seconds']:.1f} s, {taken['MB']:.0f} MB"
        )
    document["dry_run"] = taken = asked("-n", str(10**8), "--dry-run")
    console.print(f"--dry-run of 10^8 images: {taken['seconds']:.1f} s, {taken['MB']:.0f} MB")
    script.save(given.json, document)


if __name__ == "__main__":
    main()
