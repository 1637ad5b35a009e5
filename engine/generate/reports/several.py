"""Several watchers in place of one, and one that says nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TextIO

from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.reports.line import Line
from stepfuse.engine.generate.reports.lines import Lines
from stepfuse.engine.generate.reports.outlet import Outlet
from stepfuse.engine.generate.watching import Begun, Watcher


class Several:
    """Passes everything on, in the order of the watchers. What one raises is raised.

    Only the last call reaches everybody whatever happens, so that all can close their files.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers
        self._over = False

    def begin(self, begun: Begun) -> None:
        """A run starts."""
        self._over = False
        for watcher in self.watchers:
            watcher.begin(begun)

    def up(self, worker: int, running: bool) -> None:
        """A worker has loaded its network, or is gone."""
        for watcher in self.watchers:
            watcher.up(worker, running)

    def made(self, worker: int, images: int) -> None:
        """So many more images are finished."""
        for watcher in self.watchers:
            watcher.made(worker, images)

    def shard(self, worker: int, record: Record) -> None:
        """A shard is in place."""
        for watcher in self.watchers:
            watcher.shard(worker, record)

    def failed(self, shard: int, attempt: int, error: str, final: bool) -> None:
        """An attempt has failed."""
        for watcher in self.watchers:
            watcher.failed(shard, attempt, error, final)

    def note(self, text: str) -> None:
        """A sentence."""
        for watcher in self.watchers:
            watcher.note(text)

    def tick(self) -> None:
        """Time goes by."""
        for watcher in self.watchers:
            watcher.tick()

    def end(self) -> None:
        """The run is over; said once, however often it is called."""
        if self._over:
            return
        self._over = True
        with contextlib.ExitStack() as stack:
            for watcher in reversed(self.watchers):  # the stack begins with its last
                stack.callback(watcher.end)


class Silent(Several):
    """Says nothing."""

    def __init__(self) -> None:
        super().__init__()


def progress(
    stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Line | Lines:
    """What suits the stream, stderr where none is given: `Line` on a terminal, else `Lines`."""
    stream = sys.stderr if stream is None else stream
    return Line(stream, clock) if Outlet(stream).is_terminal else Lines(stream, clock)
