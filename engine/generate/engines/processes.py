"""Local processes: one network each, a shard at a time, handed out over pipes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from stepfuse.engine.generate.child import Order
from stepfuse.engine.generate.crew import Crew
from stepfuse.engine.generate.engines.start import Child, paths
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.outcome import DISK, FAILURE, POISONED, USAGE, Outcome
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.stopping import Stop
from stepfuse.engine.generate.watching import Watcher
from stepfuse.engine.generate.work import note_failure

ATTEMPTS = 3
GRACE = 30.0  # seconds for the shards at hand once a signal has come
_TICK = 0.5
_STILLBORN = 3  # workers that end before they are ready, one after the other


@dataclass
class _Hand:
    """A worker: its process, and the shard that it is at."""

    index: int
    child: Child
    ready: bool = False
    shard: int | None = None


class Processes:
    """Makes shards with a crew of local processes; `run` once.

    A shard that fails, by what its network raises or by the death of its process, is tried again,
    `ATTEMPTS` times in all, and then noted in failed/. What is wrong with the disk ends the run.
    """

    def __init__(
        self,
        job: Job,
        crew: Crew,
        watcher: Watcher,
        stop: Stop,
        *,
        grace: float = GRACE,
        allow_other_isa: bool = False,
    ) -> None:
        self.job, self.crew, self.watcher, self.stop = job, crew, watcher, stop
        self.grace, self.allow_other_isa = grace, allow_other_isa
        self.outcome = Outcome()
        self._again: deque[int] = deque()
        self._attempts: dict[int, int] = {}
        self._stillborn = 0
        self._deadline: float | None = None
        self._hands: list[_Hand] = []

    def run(self, shards: Iterable[int]) -> Outcome:
        """Make them all, in about this order."""
        waiting = iter(shards)
        wanted = min(len(self.crew), _at_most(shards, len(self.crew)))
        self._hands = [_Hand(i, self._start(i)) for i in range(wanted)]
        try:
            while self._hands and not self.outcome.reason:
                self._hand_out(waiting)
                self._hear()
                self.watcher.tick()
                self._look_at_the_clock()
        finally:
            self._dismiss()
        if self.outcome.failed and not self.outcome.status:
            self.outcome.status = POISONED
        return self.outcome

    def _start(self, index: int) -> Child:
        place = self.crew[index]
        arguments = {"url": self.job.place.url, "allow_other_isa": self.allow_other_isa}
        order = Order("shards", paths(), place.cpus, place.threads, place.device, arguments)
        return Child(order, place.environment)

    def _hand_out(self, waiting: Iterator[int]) -> None:
        """A shard for everyone who is ready; who gets none goes."""
        for hand in list(self._hands):
            if not hand.ready or hand.shard is not None:
                continue
            k = None if self.stop.level else self._next(waiting)
            if k is None:
                # others may bring their shards back
                if self.stop.level or not any(h.shard is not None for h in self._hands):
                    self._bow_out(hand)
                continue
            hand.shard = k
            hand.child.send((k, self._attempts.get(k, 0) + 1))

    def _next(self, waiting: Iterator[int]) -> int | None:
        if self._again:
            return self._again.popleft()
        return next(waiting, None)

    def _hear(self) -> None:
        pipes: dict[Any, _Hand] = {hand.child.pipe: hand for hand in self._hands}
        for pipe in wait(list(pipes), timeout=_TICK) if pipes else ():
            hand = pipes[pipe]
            message = hand.child.heard()
            if message is None:
                self._lost(hand)
            else:
                self._take(hand, *message)

    def _take(self, hand: _Hand, what: str, *rest: Any) -> None:
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
                self._give_up(DISK, text)
            else:
                self._failed(k, text, trace)
        elif what == "broken":
            kind, text, _ = rest
            status = {"disk": DISK, "given": USAGE}.get(kind, FAILURE)
            self._give_up(status, text)

    def _done(self, hand: _Hand, record: Record) -> None:
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
            self._give_up(DISK, f"{error.filename}: {error.strerror}")
        if final:
            self.outcome.failed[k] = text
        else:
            self._again.append(k)

    def _lost(self, hand: _Hand) -> None:
        """A process is gone: its shard goes back, and another takes its place."""
        death = hand.child.death()
        self.watcher.up(hand.index, False)
        if hand.shard is not None:
            self._failed(hand.shard, death)
        elif not hand.ready:
            self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                self._give_up(FAILURE, f"{death}, {_STILLBORN} times before it was ready")
        if self.stop.level or self.outcome.reason:
            self._hands.remove(hand)
        else:
            hand.child, hand.ready, hand.shard = self._start(hand.index), False, None

    def _look_at_the_clock(self) -> None:
        """Once it was asked to stop: until the grace is over, or at once."""
        if not self.stop.level:
            return
        self.outcome.status = self.outcome.status or self.stop.status
        if self._deadline is None:
            self._deadline = time.monotonic() + self.grace
            self.watcher.note(f"stopping: shards at hand have {self.grace:g} s to be finished")
        for hand in list(self._hands):
            if not hand.ready:
                hand.child.drop()
                self._bow_out(hand)
        if self.stop.level > 1 or time.monotonic() > self._deadline:
            self.outcome.reason = "stopped"

    def _bow_out(self, hand: _Hand) -> None:
        self._hands.remove(hand)
        hand.child.end()
        self.watcher.up(hand.index, False)

    def _give_up(self, status: int, reason: str) -> None:
        if not self.outcome.reason:
            self.outcome.status, self.outcome.reason = status, reason

    def _dismiss(self) -> None:
        """Nobody is left behind, whatever has happened."""
        for hand in self._hands:
            hand.child.drop()
        for hand in self._hands:
            hand.child.end()
            self.watcher.up(hand.index, False)
        self._hands = []


def _at_most(shards: Iterable[int], most: int) -> int:
    """How many there are, as far as anyone can tell without taking them."""
    try:
        return len(shards)  # type: ignore[arg-type]
    except TypeError:
        return most
