"""What every engine with several workers does: hand out shards, try again, know when to end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.outcome import DISK, FAILURE, POISONED, USAGE, Outcome
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.stopping import Stop
from stepfuse.engine.generate.watching import Watcher
from stepfuse.engine.generate.work import note_failure

ATTEMPTS = 3
GRACE = 30.0  # seconds for the shards at hand once a signal has come
TICK = 0.5  # seconds that an engine may wait for its workers
_STILLBORN = 3  # lost before they are ready, for each worker, and none that became ready meanwhile


@dataclass(kw_only=True)
class Hand:
    """A worker: its number, and the shard that it is at."""

    index: int
    ready: bool = False
    shard: int | None = None


H = TypeVar("H", bound=Hand)


class Foreman(ABC, Generic[H]):
    """Makes shards with workers of some kind; `run` once.

    A shard that fails, by what its network raises or by the loss of its worker, is tried again,
    `ATTEMPTS` times in all, and then noted in failed/. What is wrong with the disk ends the run.
    """

    def __init__(self, job: Job, watcher: Watcher, stop: Stop, grace: float = GRACE) -> None:
        self.job, self.watcher, self.stop, self.grace = job, watcher, stop, grace
        self.outcome = Outcome()
        self.hands: list[H] = []
        self._waiting: Iterator[int] = iter(())
        self._exhausted = False
        self._again: deque[int] = deque()
        self._attempts: dict[int, int] = {}
        self._stillborn = 0
        self._deadline: float | None = None

    def run(self, shards: Iterable[int]) -> Outcome:
        """Make them all, in about this order."""
        self._waiting = iter(shards)
        try:
            self.start(_at_most(shards))
            while self.hands and not self.outcome.reason:
                self._hand_out()
                self.hear()
                self.watcher.tick()
                self._look_at_the_clock()
        finally:
            self.dismiss()
        if self.outcome.failed and not self.outcome.status:
            self.outcome.status = POISONED
        return self.outcome

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many there will be."""

    @abstractmethod
    def start(self, most: int | None) -> None:
        """Begin with `hands`; more than ``most`` would have nothing to do."""

    @abstractmethod
    def give(self, hand: H, k: int, attempt: int) -> None:
        """Let it make shard k."""

    @abstractmethod
    def hear(self) -> None:
        """Wait for `TICK` seconds at most, and `take` what was said or call `lost`."""

    @abstractmethod
    def replace(self, hand: H) -> None:
        """Put a new worker in the place of one that was lost."""

    @abstractmethod
    def release(self, hand: H) -> None:
        """Let a worker end that is at nothing."""

    @abstractmethod
    def dismiss(self) -> None:
        """Nobody is left behind, whatever has happened."""

    def take(self, hand: H, what: str, *rest: Any) -> None:
        """What a worker says: an answer of `making`, or ("made", images)."""
        if what == "ready":
            hand.ready, self._stillborn = True, 0
            self.watcher.up(hand.index, True)
        elif what == "made":
            self.watcher.made(hand.index, rest[0])
        elif what == "done":
            self._done(hand, rest[1])
        elif what == "failed":
            k, kind, text, trace = rest
            hand.shard = None
            if kind == "disk":
                self.give_up(DISK, text)
            else:
                self._failed(k, text, trace)
        elif what == "broken":
            kind, text, _ = rest
            status = {"disk": DISK, "given": USAGE}.get(kind, FAILURE)
            self.give_up(status, text)

    def lost(self, hand: H, death: str) -> None:
        """A worker is gone: its shard goes back, and another takes its place."""
        self.watcher.up(hand.index, False)
        if hand.shard is not None:
            self._failed(hand.shard, death)
        elif not hand.ready:
            self._stillborn += 1
            if self._stillborn >= _STILLBORN * len(self.hands):
                self.give_up(FAILURE, f"{death}, {self._stillborn} times before it was ready")
        hand.ready, hand.shard = False, None
        if self.stop.level or self.outcome.reason:
            self.hands.remove(hand)
        else:
            self.replace(hand)

    def give_up(self, status: int, reason: str) -> None:
        """End the run; the first reason is the one that is told."""
        if not self.outcome.reason:
            self.outcome.status, self.outcome.reason = status, reason

    def _hand_out(self) -> None:
        """A shard for everyone who is ready; once there are none left, everyone goes."""
        for hand in list(self.hands):
            if not hand.ready or hand.shard is not None:
                continue
            k = None if self.stop.level else self._next()
            if k is not None:
                hand.shard = k
                self.give(hand, k, self._attempts.get(k, 0) + 1)
            elif self.stop.level:
                self._bow_out(hand)
        # those that are being made may come back
        if self._exhausted and not self._again and all(h.shard is None for h in self.hands):
            for hand in list(self.hands):
                self._bow_out(hand)

    def _next(self) -> int | None:
        if self._again:
            return self._again.popleft()
        k = next(self._waiting, None)
        self._exhausted = k is None
        return k

    def _done(self, hand: H, record: Record) -> None:
        hand.shard = None
        self._attempts.pop(record.shard, None)
        self.outcome.made += 1
        self.watcher.shard(hand.index, record)

    def _failed(self, k: int, text: str, trace: str = "") -> None:
        self._attempts[k] = self._attempts.get(k, 0) + 1
        final = self._attempts[k] >= ATTEMPTS
        self.watcher.failed(k, self._attempts[k], text, final)
        try:
            note_failure(self.job, k, text, self._attempts[k], trace)
        except OSError as error:
            self.give_up(DISK, f"{error.filename}: {error.strerror}")
        if final:
            self.outcome.failed[k] = text
        else:
            self._again.append(k)

    def _look_at_the_clock(self) -> None:
        """Once it was asked to stop: until the grace is over, or at once."""
        if not self.stop.level:
            return
        self.outcome.status = self.outcome.status or self.stop.status
        if self._deadline is None:
            self._deadline = time.monotonic() + self.grace
            self.watcher.note(f"stopping: shards at hand have {self.grace:g} s to be finished")
        for hand in list(self.hands):
            if not hand.ready:
                self._bow_out(hand)
        if self.stop.level > 1 or time.monotonic() > self._deadline:
            self.outcome.reason = "stopped"

    def _bow_out(self, hand: H) -> None:
        self.hands.remove(hand)
        self.release(hand)
        self.watcher.up(hand.index, False)


def _at_most(shards: Iterable[int]) -> int | None:
    """How many there are, as far as anyone can tell without taking them."""
    try:
        return len(shards)  # type: ignore[arg-type]
    except TypeError:
        return None
