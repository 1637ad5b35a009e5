"""The smallest kernels under compute-sanitizer, which sees accesses that leave results right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from stepfuse.bench.gpu_check.check import Check, Context, Skipped
from stepfuse.bench.gpu_check.sanitized import OPS

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # the exit status where the tool found something
TAIL = 12  # lines that are kept of what it says
_MODULE = "stepfuse.bench.gpu_check.sanitized"
_SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: .*")
_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def run(context: Context) -> None:
    """Every tool on every op, all at once: each of them takes its time to start."""
    command = [sys.executable, "-m", _MODULE]
    if context.stands_in:
        jobs = {op: [*command, op, "--stand-in"] for op in OPS}
    else:
        program = find()
        if program is None:
            raise Skipped("compute-sanitizer is not installed")
        context.note("program", program)
        jobs = {
            f"{tool} {op}": [
                program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "10",
                *command, op,
            ]
            for tool in TOOLS
            for op in OPS
        }  # fmt: skip
    # memory that torch keeps is one allocation to the tool: without, it sees every tensor's end
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {
        name: subprocess.Popen(
            job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for name, job in jobs.items()
    }
    for name, process in running.items():
        _conclude(context, name, process)


def find() -> str | None:
    """compute-sanitizer, on the path or where CUDA and its wheels put it."""
    found = shutil.which("compute-sanitizer")
    places = [Path(folder) for folder in _FOLDERS]
    places += [Path(entry) / "nvidia" for entry in sys.path if entry]
    for place in places if found is None else ():
        if place.is_dir():
            depth = ("", "*/bin/", "bin/", "*/compute-sanitizer/")
            hits = [hit for at in depth for hit in place.glob(f"{at}compute-sanitizer")]
            found = next((str(hit) for hit in hits if hit.is_file()), None)
        if found:
            break
    return found


def _conclude(context: Context, name: str, process: subprocess.Popen[str]) -> None:
    began = time.perf_counter()
    try:
        said, _ = process.communicate(timeout=max(context.seconds_left - 2, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        context.note(name, {"status": "no time", "seconds": round(time.perf_counter() - began, 1)})
        context.note(f"{name}, the end", said.splitlines()[-TAIL:])
        return
    summary = _SUMMARY.search(said)
    found = {"status": process.returncode, "said": summary[0] if summary else "nothing"}
    context.note(name, found)
    if process.returncode:
        context.note(f"{name}, the end", said.splitlines()[-TAIL:])
        what = "found something" if process.returncode == FOUND else "failed"
        context.expect(False, f"{name}: {what}: {found['said']}")


CHECK = Check(
    "sanitizer",
    "correctness",
    40.0,
    run,
    "compute-sanitizer's memcheck and racecheck on a group norm in two passes and on an update.",
)
