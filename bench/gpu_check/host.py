"""What the checks run on, asked in a process of its own: the parent never touches CUDA.

``python -m stepfuse.bench.gpu_check.host`` prints one line of JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import torch

from stepfuse.bench import machine

_QUERY_S = 20.0  # seconds that nvidia-smi may take


def ask(environment: dict[str, str], limit_s: float = 120.0) -> dict[str, Any]:
    """The facts of this machine; without CUDA ``card`` is None and ``reason`` says why.

    A process that dies or hangs while it looks for a GPU is a machine without one.
    """
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"card": None, "reason": f"looking for a GPU took more than {limit_s:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"card": None, "reason": last}
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def describe() -> dict[str, Any]:
    """card, driver, torch, triton, python, date, commit and the CPU."""
    on_cuda = torch.cuda.is_available()
    found = machine.describe(torch.device("cuda", 0) if on_cuda else None)
    reason = "" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    return {
        "card": found.device if on_cuda else None,
        "reason": "" if on_cuda else reason or "torch.cuda.is_available() is False",
        "driver": query("driver_version"),
        "cuda": torch.version.cuda,
        "torch": found.versions["torch"],
        "triton": found.versions.get("triton"),
        "python": found.python,
        "date": found.date,
        "commit": found.commit,
        "processor": found.processor,
        "cores": found.logical_cores,
    }


def query(fields: str) -> str | None:
    """What nvidia-smi says of the first GPU, values side by side; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


if __name__ == "__main__":
    print(json.dumps(describe()))
