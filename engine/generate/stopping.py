"""Signals that end a run: the first lets it finish what it is at, the second does not."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PREEMPTED, INTERRUPTED = 75, 130
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class Stop:
    """What has been asked for.

    Attributes:
        level: 0 go on, 1 begin nothing new, 2 leave everything.
        status: of the process, once it has been asked to stop.
    """

    def __init__(self) -> None:
        self.level, self.status = 0, 0

    def ask(self, number: int | None = None) -> None:
        """A signal, or somebody's wish: each raises the level."""
        self.level = min(2, self.level + 1)
        if not self.status:
            self.status = INTERRUPTED if number == signal.SIGINT else PREEMPTED

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Inside, SIGINT, SIGTERM, SIGHUP and SIGUSR1 (SLURM's warning) only `ask`.

        Outside the main thread nobody hears them here: Python runs handlers in the main thread.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                if number is None:
                    continue
                handler = signal.getsignal(number)
                if handler is not None and (handler is not signal.SIG_IGN or name == "SIGUSR1"):
                    before[number] = handler
                    signal.signal(number, self._take)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.ask(number)
