"""stdout and stderr that never end a command: what was written to files is there all the same."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_results: list[Path] = []


class Sheet:
    """A text stream that takes everything and remembers why it could not pass something on.

    Characters that its encoding lacks are written as escapes. After a failure the rest is dropped,
    and so is what the stream still holds: Python would try it again at the end, and fail there.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write what can be written."""
        if self.failure is None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: it has been closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        if self.failure is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _give_up(self, error: Exception) -> None:
        self.failure = error
        # a stream in memory has no descriptor
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self.stream.fileno())
            finally:
                os.close(nowhere)


def wrote(*paths: Path) -> None:
    """Tell `printing` that these files are the result of the command, and are there."""
    _results.extend(paths)


class Printing:
    """What became of the output of a command."""

    def __init__(self) -> None:
        self.sheets = {
            name: Sheet(stream)
            for name in ("stdout", "stderr")
            if (stream := getattr(sys, name)) is not None
        }

    def judge(self, status: int) -> int:
        """The exit status: 1 where what should have been printed was the only result.

        A reader that closed its end (`| head`) wanted no more. Where files were written they are
        named on stderr, and the status stays.
        """
        sheet = self.sheets.get("stdout")
        if sheet is not None:
            sheet.flush()
        if sheet is None or sheet.failure is None or isinstance(sheet.failure, BrokenPipeError):
            return status
        why = getattr(sheet.failure, "strerror", None) or str(sheet.failure)
        if _results:
            names = ", ".join(map(str, _results))
            print(f"note: {names}: written, but stdout takes no more: {why}", file=sys.stderr)
            return status
        print(f"error: stdout takes no more: {why}", file=sys.stderr)
        return status or 1


@contextlib.contextmanager
def printing() -> Iterator[Printing]:
    """Inside, nothing that is printed raises."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    _results.clear()
    found = Printing()
    try:
        for name, sheet in found.sheets.items():
            setattr(sys, name, sheet)
        yield found
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)
