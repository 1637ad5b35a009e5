"""Work in a process of its own that may be ended: candidates that compile for as long as they like.

The child is ``python -m stepfuse.bench.gpu_check.network_child JOB`` in a process group of its own,
with the processes that it starts. It writes its facts to a file as it goes, so that those of one
that is ended are known up to there.
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
from pathlib import Path
from typing import Any

LINES = 12  # of what a failed child wrote last
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def ask(module: str, job: dict[str, Any], cap_s: float) -> dict[str, Any]:
    """The facts and what was wrong, by `answer` in ``module``; ``ended`` says how it ended.

    It is killed, with whatever it started, after ``cap_s`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, text = Path(folder, "facts.json"), Path(folder, "stderr")
        with text.open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps({**job, "path": str(path)})],
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                ended = f"exit status {child.wait(cap_s)}"
            except subprocess.TimeoutExpired:
                ended = f"killed after {cap_s:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        found = {"facts": {}, "wrong": []}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        found["ended"] = ended
        if ended != "exit status 0":
            lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
            found["last_lines"] = lines[-LINES:]
        return found


def answer(path: str, facts: dict[str, Any], wrong: list[str]) -> None:
    """The child's side: write what is known so far; the file is whole or it is the one before."""
    whole = Path(path)
    part = whole.with_suffix(".part")
    part.write_text(json.dumps({"facts": facts, "wrong": wrong}), encoding="utf-8")
    part.replace(whole)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, which no group of theirs would."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
