"""Ray actors: a network each, on any machine of a cluster that sees the job's place.

Ray Core, and not Ray Data: an actor is given the number of a shard, writes the shard itself, and
returns the record; images never enter Ray's object store.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

from stepfuse.engine.generate.engines.actor import remote_class
from stepfuse.engine.generate.engines.cluster import joined, require_ray, room
from stepfuse.engine.generate.engines.foreman import GRACE, TICK, Foreman, Hand
from stepfuse.engine.generate.engines.start import paths
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.machine import physical_cores
from stepfuse.engine.generate.stopping import Stop
from stepfuse.engine.generate.watching import Watcher

_DROPPING = 5.0  # seconds for an actor to remove what it has begun
_LOOK = 2.0  # seconds between two questions to an actor how far it is
_GROWTH = 10.0  # seconds between two looks for new machines
_EARS = "ears"  # the thread of an actor that answers while the other one works


@dataclass(kw_only=True)
class _Hand(Hand):
    """With its actor, what it was asked for last, and what is known of its shard.

    Attributes:
        call: reference of the answer to `give`, or to be ready.
        look: reference of the answer to how far it is; None where it was not asked.
        asked: when it was.
        images: of its shard that are finished, as far as is known.
    """

    actor: Any
    call: Any
    look: Any = None
    asked: float = 0.0
    images: int = 0


class RayActors(Foreman[_Hand]):
    """Makes shards with the actors of a cluster; `run` once.

    There is an actor for every ``threads`` CPUs of every machine, or every GPU; one that finds no
    room waits for it, and joins in when it comes. An actor that is lost, with its machine or alone,
    is replaced.

    Args:
        device: of the networks; any GPU for "cuda".
        address: of the cluster; see `joined`.
        workers: actors, whether there is room for them yet or not.

    Raises ValueError where Ray is missing, the cluster cannot be joined, or no machine has room for
    a single actor.
    """

    def __init__(
        self,
        job: Job,
        device: str,
        watcher: Watcher,
        stop: Stop,
        *,
        address: str | None = None,
        workers: int | None = None,
        grace: float = GRACE,
        allow_other_isa: bool = False,
    ) -> None:
        super().__init__(job, watcher, stop, grace)
        self.allow_other_isa = allow_other_isa
        self._ray = require_ray()
        self._threads = job.settings.threads or 1
        self._device = device.partition(":")[0]  # Ray shows an actor its own GPU alone
        self._gpus = int(self._device == "cuda")
        self._seen = time.monotonic()
        with contextlib.ExitStack() as stack:
            cpus = max(physical_cores(), (workers or 1) * self._threads)
            stack.enter_context(joined(address, cpus))
            self._grows = workers is None
            self._workers = workers or self._room()
            if not self._workers:
                gpu = " and a GPU" if self._gpus else ""
                raise ValueError(
                    f"no machine of the Ray cluster has {self._threads} CPUs{gpu} for a worker; "
                    "accepted: a larger cluster, or --workers N to wait until there is room"
                )
            self._joined = stack.pop_all()

    @property
    def workers(self) -> int:
        """How many there will be at first."""
        return self._workers

    def start(self, most: int | None) -> None:
        """Ask for actors, as far as there are shards."""
        self._most = most
        self._grow(self.workers)

    def give(self, hand: _Hand, k: int, attempt: int) -> None:
        """Let it make shard k."""
        hand.call = hand.actor.make.remote(k, attempt)
        hand.look, hand.images, hand.asked = None, 0, time.monotonic()

    def hear(self) -> None:
        """Wait for answers, and for the loss of those who owe one."""
        self._ask()
        owed = {hand.call: hand for hand in self.hands if hand.shard is not None or not hand.ready}
        owed |= {hand.look: hand for hand in self.hands if hand.look is not None}
        if not owed:
            time.sleep(TICK)
            return
        for call in self._ray.wait(list(owed), timeout=TICK)[0]:
            hand = owed[call]
            try:
                answer = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                self._kill(hand)
                self.lost(hand, f"the Ray actor was lost: {_first_line(error)}")
                continue
            if call == hand.look:
                hand.look = None
                self._far(hand, *answer)
            else:
                if answer[0] == "done":
                    self._far(hand, answer[1], answer[2].count)
                self.take(hand, *answer)
        if time.monotonic() - self._seen > _GROWTH and self._grows:
            self._grow(self._room())

    def replace(self, hand: _Hand) -> None:
        """Another actor, wherever there is room."""
        hand.actor, hand.call = self._actor()
        hand.look = None

    def release(self, hand: _Hand) -> None:
        """It has begun nothing, so that nothing is left."""
        self._kill(hand)

    def dismiss(self) -> None:
        """Drop what they have begun, end them all, and leave the cluster if it was joined here."""
        try:
            busy = [hand for hand in self.hands if hand.shard is not None]
            for hand in busy:
                hand.actor.drop.options(concurrency_group=_EARS).remote()
            if busy:
                calls = [hand.call for hand in busy]
                self._ray.wait(calls, num_returns=len(calls), timeout=_DROPPING)
            for hand in self.hands:
                self._kill(hand)
                self.watcher.up(hand.index, False)
            self.hands = []
        finally:
            self._joined.close()

    def _room(self) -> int:
        self._seen = time.monotonic()
        return room(self._threads, self._gpus)

    def _grow(self, wanted: int) -> None:
        """Ask for actors until there are so many, or one for every shard."""
        if self._most is not None:
            wanted = min(wanted, self._most)
        free = [i for i in range(wanted) if i not in {hand.index for hand in self.hands}]
        for i in free[: max(0, wanted - len(self.hands))]:
            actor, call = self._actor()
            self.hands.append(_Hand(index=i, actor=actor, call=call))

    def _actor(self) -> tuple[Any, Any]:
        """An actor, and the reference of its answer that it is ready."""
        url = self.job.place.url
        order = {
            "url": url if "://" in url else os.path.abspath(url),
            "device": self._device,
            "allow_other_isa": self.allow_other_isa,
        }
        places = [*paths(), os.getcwd()]
        make = self._ray.remote(concurrency_groups={_EARS: 1})(remote_class()).options(
            num_cpus=self._threads,
            num_gpus=self._gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        actor = make.remote(places, self._threads, order)
        return actor, actor.load.remote()

    def _ask(self) -> None:
        """Ask those who work how far they are, now and then."""
        now = time.monotonic()
        for hand in self.hands:
            if hand.shard is not None and hand.look is None and now - hand.asked > _LOOK:
                hand.look = hand.actor.look.options(concurrency_group=_EARS).remote()
                hand.asked = now

    def _far(self, hand: _Hand, k: int, images: int) -> None:
        if k == hand.shard and images > hand.images:
            self.take(hand, "made", images - hand.images)
            hand.images = images

    def _kill(self, hand: _Hand) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(hand.actor, no_restart=True)


def _first_line(error: Exception) -> str:
    """Ray's errors go on for many lines."""
    lines = str(error).strip().splitlines()
    return " ".join([type(error).__name__ + ":", *lines[:1]])
