"""How far a run is, how fast, and for how long it will go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.reports.speed import Speed
from stepfuse.engine.generate.watching import Begun

WRITER_BOUND = 0.1  # of the workers' time
_SILENCE = 10.0  # seconds without a call, of which there are two in every second
_DONE, _FAILED = 1, 2
NOTHING = Begun("", 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Reading:
    """What a `Meter` shows.

    Attributes:
        images: of the job that are finished, with those of shards that are being made.
        images_in_place: those whose shards are in place.
        images_wanted: that the whole job has.
        shards_done, shards_failed, shards: of the whole job, but failed in this run.
        rate: images per second that the workers finish now, all together.
        workers: images per second of each; None for one that is not running.
        eta: seconds until this run has made what it was asked for; None where nobody knows.
        writer_wait: seconds that sampling was held up by the writer, in this run.
        writer_share: of the workers' time; None before the first shard.
        seconds: since the run began, until it ended.
        mean: images per second of the run; only what it put in place, and made itself, counts.
    """

    images: int
    images_in_place: int
    images_wanted: int
    shards_done: int
    shards_failed: int
    shards: int
    rate: float
    workers: dict[int, float | None]
    eta: float | None
    writer_wait: float
    writer_share: float | None
    seconds: float
    mean: float

    @property
    def writer_bound(self) -> bool:
        """Whether the workers would be faster with a faster writer."""
        return self.writer_share is not None and self.writer_share > WRITER_BOUND


class _Worker:
    def __init__(self, now: float) -> None:
        self.running: bool | None = None  # until it is told of
        self.images = 0  # of the shard that it is at
        self.speed = Speed(now)


class Meter:
    """Is told what a `Watcher` is told, in whatever order, and adds it up.

    Args:
        clock: seconds since any time, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin(NOTHING)

    def begin(self, begun: Begun) -> None:
        """A run starts; nothing of an earlier one is kept."""
        self.begun = begun
        self._start = self._heard = self._clock()
        self._end: float | None = None
        self._workers = {worker: _Worker(self._start) for worker in range(begun.workers)}
        self._state = bytearray(begun.shards)
        self._placed = self._own = self._largest = 0
        self._seconds = self._waited = 0.0

    def up(self, worker: int, running: bool) -> None:
        """A worker has loaded its network, or is gone, and with it what it had begun."""
        self._workers[worker] = _Worker(self._hear())
        self._workers[worker].running = running

    def made(self, worker: int, images: int) -> None:
        """So many more images are finished."""
        now = self._hear()
        found = self._worker(worker)
        if found.running and images > 0:
            found.images += images
            found.speed.add(now, images)

    def shard(self, worker: int, record: Record) -> None:
        """A shard is in place; it counts once, however often it is told of."""
        now = self._hear()
        found = self._worker(worker)
        if found.images == 0 and now - found.speed.last >= record.seconds / 2 > 0:
            # its engine tells of whole shards only; what others have made is told of at once
            found.images = record.count
            found.speed.add(now, record.count)
        if self._settle(record.shard, _DONE):
            self._placed += record.count
            self._own += min(record.count, found.images)
            self._largest = max(self._largest, record.count)
            self._seconds += max(0.0, record.seconds)
            self._waited += max(0.0, record.writer_wait)
        found.images = 0

    def failed(self, shard: int, final: bool) -> None:
        """An attempt has failed."""
        self._hear()
        if len(self._workers) == 1:  # of several, nobody knows whose it was
            next(iter(self._workers.values())).images = 0
        if final:
            self._settle(shard, _FAILED)

    def tick(self) -> None:
        """Time goes by."""
        self._hear()

    def end(self) -> None:
        """The run is over: nobody works, and what was begun is lost."""
        if self._end is None:
            self._end = self._hear()
        for number in self._workers:
            self.up(number, False)

    def read(self) -> Reading:
        """What is shown now."""
        now, begun = self._hear(), self.begun
        rates = {
            number: worker.speed.value(now) if worker.running else None
            for number, worker in sorted(self._workers.items())
        }
        rate = sum(value for value in rates.values() if value is not None)
        in_place = begun.images_done + self._placed
        under_way = self._under_way()
        share = min(1.0, self._waited / self._seconds) if self._seconds > 0 else None
        seconds = (now if self._end is None else self._end) - self._start
        return Reading(
            images=max(in_place, min(begun.images, in_place + under_way)),
            images_in_place=in_place,
            images_wanted=begun.images,
            shards_done=begun.shards_done + self._state.count(_DONE),
            shards_failed=self._state.count(_FAILED),
            shards=begun.shards,
            rate=rate,
            workers=rates,
            eta=self._eta(rate, under_way),
            writer_wait=self._waited,
            writer_share=share,
            seconds=seconds,
            mean=self._own / seconds if seconds > 0 else 0.0,
        )

    def _hear(self) -> float:
        """The time now; a long silence before it is a pause."""
        now = max(self._heard, self._clock())
        if now - self._heard > _SILENCE:
            for worker in self._workers.values():
                worker.speed.pause(self._heard, now)
        self._heard = now
        return now

    def _worker(self, number: int) -> _Worker:
        """Who finishes something runs, and has from the start, unless it is known to be gone."""
        found = self._workers.setdefault(number, _Worker(self._start))
        if found.running is None:
            found.running = self._end is None
        return found

    def _settle(self, shard: int, state: int) -> bool:
        """Note what has become of a shard; whether that is news. What is done stays done."""
        if shard >= len(self._state):
            self._state.extend(bytes(shard + 1 - len(self._state)))
        news = self._state[shard] not in (_DONE, state)
        if news:
            self._state[shard] = state
        return news

    def _under_way(self) -> int:
        """Images of shards that are not in place yet, of no worker more than one shard has."""
        most = max(self._largest, self._a_shard())
        return sum(min(most, worker.images) for worker in self._workers.values())

    def _a_shard(self) -> int:
        """Images of one, about: the last one of a job may be short."""
        return -(-self.begun.images_asked // max(1, self.begun.shards_asked))

    def _eta(self, rate: float, under_way: int) -> float | None:
        failed = self._state.count(_FAILED)
        if self._state.count(_DONE) + failed >= self.begun.shards_asked:
            return 0.0
        given_up = failed * self._a_shard()
        left = max(0, self.begun.images_asked - self._placed - given_up - under_way)
        return left / rate if rate > 0 else None
