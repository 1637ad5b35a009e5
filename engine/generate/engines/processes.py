"""Local processes: one network each, a shard at a time, handed out over pipes."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from stepfuse.engine.generate.crew import Crew
from stepfuse.engine.generate.engines.foreman import GRACE, TICK, Foreman, Hand
from stepfuse.engine.generate.engines.start import Child, paths
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.order import Order
from stepfuse.engine.generate.stopping import Stop
from stepfuse.engine.generate.watching import Watcher


@dataclass(kw_only=True)
class _Hand(Hand):
    """With its process."""

    child: Child


class Processes(Foreman[_Hand]):
    """Makes shards with a crew of local processes; `run` once."""

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
        super().__init__(job, watcher, stop, grace)
        self.crew, self.allow_other_isa = crew, allow_other_isa

    @property
    def workers(self) -> int:
        """How many there will be."""
        return len(self.crew)

    def start(self, most: int | None) -> None:
        """A process for every berth, as far as there are shards."""
        wanted = self.workers if most is None else min(most, self.workers)
        self.hands = [_Hand(index=i, child=self._child(i)) for i in range(wanted)]

    def give(self, hand: _Hand, k: int, attempt: int) -> None:
        """Let it make shard k."""
        hand.child.send((k, attempt))

    def hear(self) -> None:
        """Wait for what they say, and for those that end."""
        pipes: dict[Any, _Hand] = {hand.child.pipe: hand for hand in self.hands}
        for pipe in wait(list(pipes), timeout=TICK) if pipes else ():
            hand = pipes[pipe]
            message = hand.child.heard()
            if message is None:
                self.lost(hand, hand.child.death())
            else:
                self.take(hand, *message)

    def replace(self, hand: _Hand) -> None:
        """Another process in its berth."""
        hand.child = self._child(hand.index)

    def release(self, hand: _Hand) -> None:
        """Let it end; one that still loads its network would not hear that its pipe is closed."""
        if not hand.ready:
            hand.child.drop()
        hand.child.end()

    def dismiss(self) -> None:
        """Drop them all, and wait until they are gone."""
        for hand in self.hands:
            hand.child.drop()
        for hand in self.hands:
            hand.child.end()
            self.watcher.up(hand.index, False)
        self.hands = []

    def _child(self, index: int) -> Child:
        place = self.crew[index]
        arguments = {"url": self.job.place.url, "allow_other_isa": self.allow_other_isa}
        order = Order("shards", paths(), place.cpus, place.threads, place.device, arguments)
        return Child(order, place.environment)
