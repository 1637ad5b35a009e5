"""On a terminal: one line that writes over itself, and sentences above it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from stepfuse.engine.generate.reports import text as texts
from stepfuse.engine.generate.reports.outlet import Outlet
from stepfuse.engine.generate.reports.report import Report
from stepfuse.engine.generate.watching import Begun


class Line(Report):
    """A `Watcher` that shows the line of ``texts.status``, drawn again at every tick.

    The line is followed by spaces up to where the last one ended, and leaves the terminal's last
    column empty: in some the cursor would go on to the next line.

    Args:
        stream: the terminal.
        clock: seconds since any time, never going back.
        width: of the terminal, now; None asks it.
    """

    def __init__(
        self,
        stream: TextIO | None,
        clock: Callable[[], float] = time.monotonic,
        width: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(clock)
        self._outlet = Outlet(stream)
        self._width = width or (lambda: self._outlet.width)
        self._shown = ""
        self._running = False

    def begin(self, begun: Begun) -> None:
        """Show the line."""
        super().begin(begun)
        self._running = True
        self._draw()

    def up(self, worker: int, running: bool) -> None:
        """Show it again."""
        super().up(worker, running)
        self._draw()

    def failed(self, shard: int, attempt: int, error: str, final: bool) -> None:
        """Say so above the line."""
        super().failed(shard, attempt, error, final)
        self._above(texts.failure(shard, attempt, error, final))

    def note(self, text: str) -> None:
        """Say it above the line."""
        self._above(texts.plain(text))

    def tick(self) -> None:
        """Show the line again."""
        super().tick()
        self._draw()

    def end(self) -> None:
        """Leave what came of the run on the screen."""
        super().end()
        if self._running:
            self._running = False
            self._replace(texts.conclusion(self.meter.read(), self._columns()), "\n")

    def _draw(self) -> None:
        if self._running:
            line = texts.status(self.meter.read(), self._columns())
            if line != self._shown:
                self._replace(line)
                self._shown = line

    def _above(self, sentence: str) -> None:
        self._replace(sentence, "\n")
        self._draw()

    def _replace(self, line: str, ending: str = "") -> None:
        """Write over what is shown; nothing is shown then that would have to be written over."""
        blank = len(self._shown[: self._columns()]) - len(line)
        back = "\r" if self._shown else ""
        self._outlet.write(f"{back}{line}{' ' * blank}{ending}")
        self._shown = ""

    def _columns(self) -> int:
        return max(1, self._width() - 1)
