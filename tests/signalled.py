"""Processes that tests send signals to."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any


def start(command: list[str], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a process that Ctrl-C, SIGTERM and SIGHUP reach.

    A signal that the parent ignores (under nohup, and with some runners of continuous integration)
    is ignored by its children, too, who would wait for ever.
    """
    return subprocess.Popen(command, preexec_fn=_deliver if os.name == "posix" else None, **options)


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a process that signals itself, its texts captured."""
    child = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = child.communicate(timeout=timeout)
    finally:
        child.kill()
    return subprocess.CompletedProcess(command, child.returncode, out, errors)


def _deliver() -> None:
    """Between fork and exec, which keeps the default of a signal and a signal that is ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
