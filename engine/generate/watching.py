"""What an engine tells whoever watches a job being made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from stepfuse.engine.generate.record import Record


@dataclass(frozen=True)
class Begun:
    """How a run starts.

    Attributes:
        url: of the job.
        images, shards: that the whole job has.
        images_done, shards_done: that were in place before.
        shards_asked: that this run is to make; all that are not done, or a slice of them.
        images_asked: in those.
        workers: how many.
        threads: of each.
    """

    url: str
    images: int
    shards: int
    images_done: int
    shards_done: int
    shards_asked: int
    images_asked: int
    workers: int
    threads: int


@runtime_checkable
class Watcher(Protocol):
    """Is told of everything, in one thread; must not take long."""

    def begin(self, begun: Begun) -> None:
        """The first call."""

    def up(self, worker: int, running: bool) -> None:
        """A worker has loaded its network, or is gone."""

    def made(self, worker: int, images: int) -> None:
        """So many more images are finished; they do not count before their shard does."""

    def shard(self, worker: int, record: Record) -> None:
        """A shard and its record are in place."""

    def failed(self, shard: int, attempt: int, error: str, final: bool) -> None:
        """An attempt has failed; with ``final`` there will be no other in this run."""

    def note(self, text: str) -> None:
        """A sentence for whoever watches."""

    def tick(self) -> None:
        """Called about twice a second."""

    def end(self) -> None:
        """The last call, whatever has happened."""
