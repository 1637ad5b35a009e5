"""Other people's work on the same cores: processes that compute without end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 256

# ends by itself where whoever started it was killed
_SPINS = """
import os, sys, time
while os.getppid() == int(sys.argv[1]):
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Inside, ``count`` processes keep a core busy each, or as much of one as they are given."""
    command = [sys.executable, "-c", _SPINS, str(os.getpid())]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def noted(count: int) -> str:
    """What a reader of the figures must know."""
    if not count:
        return ""
    what = "a busy process" if count == 1 else f"{count} busy processes"
    return f"Timed beside {what}, which every candidate had to share the cores with."
