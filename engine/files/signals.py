"""SIGINT, SIGTERM and SIGHUP: kept while a temporary name exists, then acted upon.

Python raises Ctrl-C between any two instructions, also inside ``finally``, and dies of SIGTERM
without running one. `kept` closes both gaps for whoever must clean up; `terminating` makes the
other two signals end a command as Ctrl-C does.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Ctrl-C would be; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Unwind(BaseException):
    """Takes the process to the end of `kept`, where the signal that kills it is raised again."""


class Kept:
    """The signals that have come in and wait."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.handlers: dict[int, Any] = {}

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler that only keeps."""
        self.pending.append(number)

    def act(self) -> None:
        """Let what has come in do what it does outside: raise, note it somewhere, or kill."""
        while self.pending:
            handler = self.handlers[self.pending[0]]
            if not callable(handler):
                raise _Unwind
            handler(self.pending.pop(0), None)

    def between(self, pieces: Iterable[T]) -> Iterator[T]:
        """The pieces, with `act` before each: where it raises, the loop over them is left."""
        for piece in pieces:
            self.act()
            yield piece


@contextlib.contextmanager
def kept() -> Iterator[Kept]:
    """Inside, the ending signals wait for `Kept.act`, or for the end of the block.

    Ignored signals stay ignored. Outside the main thread nothing is kept: Python runs handlers in
    the main thread alone.
    """
    waiting = Kept()
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            handler = signal.getsignal(number)
            # None: a handler that Python did not install and could not bring back
            if handler is not None and handler is not signal.SIG_IGN:
                waiting.handlers[number] = handler
                signal.signal(number, waiting.take)
    try:
        yield waiting
    except _Unwind:
        pass
    finally:
        for number, handler in waiting.handlers.items():
            signal.signal(number, handler)
        for number in waiting.pending:
            signal.raise_signal(number)


class Ended:
    """Which signal `terminating` raised last; None for none."""

    number: int | None = None


@contextlib.contextmanager
def terminating() -> Iterator[Ended]:
    """Inside, SIGTERM and SIGHUP raise `Terminated` where they would have killed the process."""
    ended = Ended()

    def end(number: int, frame: FrameType | None) -> None:
        ended.number = number
        raise Terminated(number)

    replaced = []
    if threading.current_thread() is threading.main_thread():
        others = (number for number in ENDING if number != signal.SIGINT)
        replaced = [n for n in others if signal.getsignal(n) is signal.SIG_DFL]
    try:
        for number in replaced:
            signal.signal(number, end)
        yield ended
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)
