"""Files that somebody else wrote: opened only where they are files, and what is said of them.

A named pipe waits for ever, a device may do anything, and the errors of the libraries that read
the formats end in advice to load what should not be loaded.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

NOT_THERE = "not there"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_UNSAFE = ("pickle", "weights_only", "unsafe", "allow_objects")


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """What is there instead of a file, in words; None for a file. Symbolic links are followed.

    Raises OSError where nothing can be found out.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a symbolic link to nothing" if os.path.islink(path) else NOT_THERE
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "a symbolic link to itself"
    return _kind(mode)


def check_regular(path: str | os.PathLike[str], accepted: str = "a file") -> None:
    """Raise ValueError that names ``path`` and what it is, unless it is a file.

    FileNotFoundError where nothing is there. For readers that take a path; `open_regular` is for
    those that take an open file.
    """
    kind = kind_of(path)
    if kind == NOT_THERE:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    if kind is not None:
        raise ValueError(f"{os.fspath(path)} is {kind}; accepted: {accepted}")


def open_regular(path: str | os.PathLike[str], accepted: str = "a file") -> BinaryIO:
    """Open a file for reading, without waiting for whatever else may have that name.

    Raises as `check_regular` does, and OSError where the file may not be read.
    """
    check_regular(path, accepted)
    # what was a file a moment ago may be a pipe by now, and must not block either
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
    try:
        kind = _kind(os.fstat(descriptor).st_mode)
        if kind is not None:
            raise ValueError(f"{os.fspath(path)} is {kind}; accepted: {accepted}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | os.PathLike[str], accepted: str = "a text file") -> str:
    """The content of a file in UTF-8. Raises ValueError or OSError as `open_regular` does."""
    with open_regular(path, accepted) as file:
        content = file.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{Path(path)} is no text in UTF-8: {error}") from None


def reason(error: BaseException) -> str:
    """The first line of a library's error about a file, without its hints.

    Where the library refuses Python objects, its hint is how to load them all the same; that is
    never passed on.
    """
    text = str(error)
    if any(word in text.lower() for word in _UNSAFE):
        return "it holds Python objects, which are never loaded"
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _kind(mode: int) -> str | None:
    return next((words for test, words in _KINDS if test(mode)), None)
