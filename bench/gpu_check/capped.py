"""Work in a process of its own that may be ended: what takes as long as it likes.

The child has a process group of its own, which is killed with whatever it started. One that is
asked writes its facts to a file as it goes, so that those of one that is ended are known.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LINES = 12  # of what a failed child wrote last
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def run(command: Sequence[str], cap_s: float) -> tuple[int | None, str]:
    """(exit status, what it wrote to both its outputs); None for one that was killed.

    It is killed after ``cap_s`` seconds, and with this process.
    """
    with tempfile.TemporaryFile() as written:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, *command],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = child.wait(cap_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        written.seek(0)
        return status, written.read().decode("utf-8", "replace")


def ask(module: str, job: dict[str, Any], cap_s: float) -> dict[str, Any]:
    """The facts and what was wrong, by `answer` in ``module``; ``ended`` says how it ended.

    ``module`` is run with the job in JSON, which has the path to answer to.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "facts.json")
        text = json.dumps({**job, "path": str(path)})
        status, written = run([sys.executable, "-m", module, text], cap_s)
        found: dict[str, Any] = {"facts": {}, "wrong": []}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
    found["ended"] = f"killed after {cap_s:.0f} s" if status is None else f"exit status {status}"
    if status != 0:
        found["last_lines"] = written.splitlines()[-LINES:]
    return found


def answer(path: str, facts: dict[str, Any], wrong: list[str]) -> None:
    """The child's side: write what is known so far; the file is whole or it is the one before."""
    whole = Path(path)
    part = whole.with_suffix(".part")
    part.write_text(json.dumps({"facts": facts, "wrong": wrong}), encoding="utf-8")
    part.replace(whole)


def main(command: Sequence[str]) -> None:
    """Become ``command``, which the kernel kills when the parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
