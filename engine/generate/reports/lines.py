"""Without a terminal: a line every half a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from stepfuse.engine.generate.reports import text as texts
from stepfuse.engine.generate.reports.outlet import Outlet
from stepfuse.engine.generate.reports.report import Every, Report
from stepfuse.engine.generate.watching import Begun

PERIOD = 30.0  # seconds


class Lines(Report):
    """A `Watcher` for log files: lines at begin and end and in between, sentences at once.

    Args:
        stream: where they go.
        clock: seconds since any time, never going back.
    """

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._outlet = Outlet(stream)
        self._period = Every(PERIOD, clock)
        self._running = False

    def begin(self, begun: Begun) -> None:
        """Say what there is to do."""
        super().begin(begun)
        self._running = True
        self._period.restart()
        self._say(texts.beginning(begun))

    def failed(self, shard: int, attempt: int, error: str, final: bool) -> None:
        """Say so."""
        super().failed(shard, attempt, error, final)
        self._say(texts.failure(shard, attempt, error, final))

    def note(self, text: str) -> None:
        """Say it."""
        self._say(texts.plain(text))

    def tick(self) -> None:
        """Say how far it is when it is time."""
        super().tick()
        if self._running and self._period.due():
            self._say(texts.status(self.meter.read()))

    def end(self) -> None:
        """Say what came of it."""
        super().end()
        if self._running:
            self._running = False
            self._say(texts.conclusion(self.meter.read()))

    def _say(self, sentence: str) -> None:
        self._outlet.write(f"{sentence}\n")
