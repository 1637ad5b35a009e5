"""Free memory of the C heap, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any


def trim() -> None:
    """Return whole free pages to the system; glibc otherwise keeps them for this process.

    Weights of up to 32 MB lie in the heap, not in mappings of their own: without this call a
    process stays as large as it was at its worst moment. A few milliseconds; nothing where the
    C library has no such call.
    """
    call = _malloc_trim()
    if call is not None:
        call(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        found: Any = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found  # type: ignore[no-any-return]
