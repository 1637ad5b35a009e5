"""What all reports have in common: they are watchers, and keep a meter."""

from __future__ import annotations

import time
from collections.abc import Callable

from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.reports.meter import Meter
from stepfuse.engine.generate.watching import Begun


class Report:
    """A `Watcher` that tells its meter of everything, and nobody else.

    Args:
        clock: seconds since any time, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.meter = Meter(clock)

    def begin(self, begun: Begun) -> None:
        """A run starts."""
        self.meter.begin(begun)

    def up(self, worker: int, running: bool) -> None:
        """A worker has loaded its network, or is gone."""
        self.meter.up(worker, running)

    def made(self, worker: int, images: int) -> None:
        """So many more images are finished."""
        self.meter.made(worker, images)

    def shard(self, worker: int, record: Record) -> None:
        """A shard is in place."""
        self.meter.shard(worker, record)

    def failed(self, shard: int, attempt: int, error: str, final: bool) -> None:
        """An attempt has failed."""
        self.meter.failed(shard, final)

    def note(self, text: str) -> None:
        """A sentence."""

    def tick(self) -> None:
        """Time goes by."""
        self.meter.tick()

    def end(self) -> None:
        """The run is over."""
        self.meter.end()


class Every:
    """Says when so many seconds have gone by since it last did; at first at once.

    Args:
        seconds: in between.
        clock: seconds since any time, never going back.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds, self.clock = seconds, clock
        self._last: float | None = None

    def due(self) -> bool:
        """Whether it is time; if so, the next time is counted from now."""
        if self._last is not None and self.clock() - self._last < self.seconds:
            return False
        self.restart()
        return True

    def restart(self) -> None:
        """Count from now."""
        self._last = self.clock()
