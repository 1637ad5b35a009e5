"""A question to a process of its own, and the memory that a process holds.

The child is ``python -m MODULE JOB``, a job in JSON, and prints its answer as one line of JSON.
Only the standard library is imported here, as children time and weigh what they import.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ProcessFailed(Exception):
    """The process ended without an answer; the message is the last line it wrote."""


def ask(module: str, job: dict[str, Any], **environment: str) -> Any:
    """What ``module`` answers to the job, in a new process. Raises `ProcessFailed`."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ProcessFailed(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def answer(work: Callable[[dict[str, Any]], Any]) -> None:
    """The child's side: print what ``work`` makes of the job, the only argument."""
    # libraries may write to the standard output: it is theirs, the answer goes to a copy of it
    with os.fdopen(os.dup(1), "w") as result:
        os.dup2(2, 1)
        print(json.dumps(work(json.loads(sys.argv[1]))), file=result)


def peak_bytes() -> int:
    """Most memory this process has held.

    Linux counts into ru_maxrss what the process was before it became this program, which after a
    fork is the size of its parent: the kernel's own high-water mark is of this program alone.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes() -> int:
    """Memory this process holds; its peak so far where the system does not say."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def _status(field: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
