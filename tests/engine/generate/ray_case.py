"""Jobs for Ray, what their shards hash to without it, and machines to be switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepfuse.engine.generate.create import create
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.place import open_place
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.work import run_shard, todo

MODELS = "tests.engine.generate.ray_models"
REPOSITORY = Path(__file__).parents[3]


def job_of(
    folder: Path, model: str, n: int, shard: int = 8, threads: int = 1, **settings: Any
) -> Job:
    """A job of 4 steps that leaves nothing open, so that no trial is needed."""
    asked = Settings(
        model=f"{MODELS}:{model}",
        recipe=Recipe(steps="4"),
        format="npz",
        batch_size=4,
        shard_size=shard,
        threads=threads,
        device="cpu",
        **settings,
    )
    return create(asked, n, open_place(folder)).job


def hashes(job: Job) -> dict[int, str]:
    """sha256 of every shard that has a record."""
    return {record.shard: record.sha256 for record in job.records()}


def alone(folder: Path, model: str, n: int, shard: int = 8) -> dict[int, str]:
    """What the same job's shards hash to, made one after the other in this process."""
    job = job_of(folder, model, n, shard)
    for k in todo(job):
        run_shard(job, k)
    return hashes(job)


class Told:
    """A watcher that keeps what it is told, and does something after a number of shards."""

    def __init__(self, after: int = 0, act: Any = lambda: None) -> None:
        self.after, self.act = after, act
        self.records: list[Record] = []
        self.failures: list[tuple[int, int, str, bool]] = []
        self.notes: list[str] = []
        self.images = self.ticks = 0

    def begin(self, begun: Any) -> None:
        """The first call."""
        self.begun = begun

    def up(self, worker: int, running: bool) -> None:
        """A worker has loaded its network, or is gone."""

    def made(self, worker: int, images: int) -> None:
        """So many more images are finished."""
        self.images += images

    def shard(self, worker: int, record: Record) -> None:
        """A shard is in place."""
        self.records.append(record)
        if len(self.records) == self.after:
            self.act()

    def failed(self, shard: int, attempt: int, error: str, final: bool) -> None:
        """An attempt has failed."""
        self.failures.append((shard, attempt, error, final))

    def note(self, text: str) -> None:
        """A sentence."""
        self.notes.append(text)

    def tick(self) -> None:
        """About twice a second."""
        self.ticks += 1

    def end(self) -> None:
        """The last call."""
