"""Memory of the C heap, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt
_SMALL = 128 << 10  # both, as a process begins
_LARGE = 32 << 20  # where glibc's own growth ends


def trim() -> None:
    """Return whole free pages to the system; glibc otherwise keeps them for this process.

    Weights of up to 32 MB lie in the heap, not in mappings of their own: without this call a
    process stays as large as it was at its worst moment. A few milliseconds; nothing where the
    C library has no such call.
    """
    call = _of_libc("malloc_trim")
    if call is not None:
        call(0)


@contextlib.contextmanager
def returning() -> Iterator[None]:
    """Inside, what is freed of 128 KiB and more goes back to the system at once.

    A process is then no larger than what it holds, and slower: every large result is mapped anew.
    Afterwards glibc keeps up to 32 MiB for the next result, as it does for a process that has freed
    as much. For a process that is ours: the setting is the whole process's.
    """
    set_option = _of_libc("mallopt") or (lambda option, value: None)
    set_option(_MMAP_THRESHOLD, _SMALL)
    set_option(_TRIM_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _LARGE)
        set_option(_TRIM_THRESHOLD, 2 * _LARGE)


@functools.cache
def _of_libc(name: str) -> Callable[..., Any] | None:
    try:
        found: Any = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return found  # type: ignore[no-any-return]
