"""What an error means for a run, and one line about it."""

from __future__ import annotations

import errno

_ON_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EIO,
)


def kind(error: BaseException) -> str:
    """ "disk" for what is wrong with the place, "given" for a value that is not accepted, "other".

    The first ends a run, since every shard would fail so.
    """
    if isinstance(error, OSError) and error.errno in _ON_DISK:
        return "disk"
    return "given" if isinstance(error, (ValueError, TypeError)) else "other"


def describe(error: BaseException) -> str:
    """One line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError)):
        return text
    return f"{type(error).__name__}: {text}"
