"""What a user sees of an error: one line and an exit status."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
USAGE, FAILURE, INTERRUPTED = 2, 1, 130


class Problem(Exception):
    """Ends a command with one line on stderr and this exit status."""

    def __init__(self, line: str, status: int = FAILURE) -> None:
        super().__init__(line)
        self.status = status


@contextlib.contextmanager
def interruptible(what_is_left: str | Callable[[], str], memory: str = "") -> Iterator[None]:
    """A signal or a lack of memory inside ends the command with one line.

    Args:
        what_is_left: behind by a signal; where it must be looked for then, what finds it out.
        memory: which option of this command makes it need less.
    """
    try:
        yield
    except KeyboardInterrupt:
        left = what_is_left if isinstance(what_is_left, str) else what_is_left()
        raise Problem(f"interrupted; {left}", INTERRUPTED) from None
    except (MemoryError, RuntimeError) as error:
        if not memory or not _is_out_of_memory(error):
            raise
        raise Problem(f"out of memory; {memory}: {error}") from error


@contextlib.contextmanager
def failing_on(*kinds: type[Exception], status: int = FAILURE) -> Iterator[None]:
    """These errors inside are the fault of a file or a model, not of how the command was used.

    With ``status`` USAGE they are, the file being what was given.
    """
    try:
        yield
    except kinds as error:
        raise Problem(str(error), status) from error


@contextlib.contextmanager
def choosing_places() -> Iterator[None]:
    """A place that takes no file is a mistake of whoever named it; a full disk is not."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise Problem(describe(error)[0], USAGE) from error


def describe(error: Exception) -> tuple[str, int]:
    """The line for an error, and the exit status: 2 for what was given, 1 for everything else."""
    status = FAILURE
    parsing = getattr(error, "format_message", None)
    if isinstance(error, Problem):
        text, status = str(error), error.status
    elif callable(parsing):
        text = f"{str(parsing()).rstrip('.')}{_received(error)}"
        status = int(getattr(error, "exit_code", USAGE))
    elif _is_out_of_memory(error):
        text = f"out of memory: {error}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (ValueError, TypeError)):
        text, status = str(error), USAGE
    elif isinstance(error, OSError) or _is_unavailable(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (--debug shows where)"
    return " ".join(text.split()), status


def _received(error: Exception) -> str:
    """The value that could not be parsed, which the parser's own line may leave out."""
    details = getattr(error.__cause__, "errors", None)
    found = details() if callable(details) else []
    return f"; got {found[0]['input']!r}" if found else ""


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("allocate memory" in text or "not enough memory" in text or "out of memory" in text)
    )


def _is_unavailable(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    # no RuntimeError of ours comes before torch is loaded, and its import takes a second
    from stepfuse.kernels.backends import BackendUnavailable

    return isinstance(error, BackendUnavailable)
