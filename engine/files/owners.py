"""Whose a temporary file or a claim is: the machine and the process in its name or content."""

from __future__ import annotations

import os
import platform
import re


def host() -> str:
    """The name of this machine, fit for the name of a file."""
    return re.sub(r"[^\w-]", "-", platform.node() or "host", flags=re.ASCII)[:64]


def runs(process: int) -> bool:
    """Whether a process of this machine is still there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
