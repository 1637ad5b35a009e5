"""A stream that may fail without ending a job that makes images for days."""

from __future__ import annotations

import os
from typing import TextIO

WIDTH = 80  # characters of a terminal that does not say


class Outlet:
    """Passes text on to a stream at once, until that takes no more; then the rest is dropped.

    Attributes:
        failure: why it takes no more; None while it does.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> None:
        """Write and flush. What the encoding lacks is written as escapes."""
        if self._stream is None or self.failure is not None:
            return
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
            self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            self.failure = error

    @property
    def is_terminal(self) -> bool:
        """Whether a line can be written over; not by a terminal that calls itself dumb."""
        if self._stream is None or os.environ.get("TERM") == "dumb":
            return False
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    @property
    def width(self) -> int:
        """Of the terminal, in characters, now."""
        try:
            assert self._stream is not None
            return os.get_terminal_size(self._stream.fileno()).columns or WIDTH
        except (AssertionError, OSError, ValueError):
            return WIDTH
