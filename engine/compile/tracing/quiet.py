"""Compiling without a word: what tracers and tensors without data say of what they cannot do."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without warnings, and without what PyTorch's loggers say, both in this thread alone.

    Threads may be inside at the same time. ``warnings.catch_warnings`` would not do: it puts the
    filters of the process back to what they were on entering, whoever has changed them meanwhile.
    """
    here = threading.get_ident()

    def pass_on(record: logging.LogRecord) -> bool:
        return record.thread != here

    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger)
    ]
    for logger in loggers:
        logger.addFilter(pass_on)
    text = _AnyText(here)
    entry: Any = ("ignore", text, Warning, None, 0)
    filters: Any = warnings.filters
    filters.insert(0, entry)
    try:
        yield
    finally:
        text.thread = None
        lists: tuple[Any, ...] = (filters, warnings.filters)
        for held in lists:  # another list within somebody's catch_warnings
            with contextlib.suppress(ValueError):
                held.remove(entry)
        for logger in loggers:
            logger.removeFilter(pass_on)


class _AnyText:
    """Stands for the pattern in a filter of warnings: any text of one thread; none if it is None.

    A copy of the filters that somebody holds on to may keep it, where it then does nothing.
    """

    def __init__(self, thread: int | None) -> None:
        self.thread = thread

    def match(self, text: str) -> bool:
        """Whether the filter is for a warning that is being given."""
        return threading.get_ident() == self.thread
