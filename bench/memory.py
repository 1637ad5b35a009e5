"""Cold start and peak memory: the first images in processes that have just started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict

from stepfuse.bench.record import ColdStart
from stepfuse.bench.workload import Spec

PROCESSES = 3
LONG = 20.0  # seconds after which one process is enough
Launch = Callable[[Spec, str, int], dict[str, float]]


class ColdStartFailed(Exception):
    """The process ended without a result; the message is the last line it wrote."""


def cold_start(
    spec: Spec,
    candidate: str,
    batch: int,
    processes: int = PROCESSES,
    launch: Launch | None = None,
) -> ColdStart:
    """The figures of up to ``processes`` processes, one after the other.

    Files that have been read before come from the system's cache. torch.compile's own cache is
    empty each time. Raises `ColdStartFailed`.
    """
    result = ColdStart(batch, [], [], [], [], [])
    for _ in range(processes):
        start = time.perf_counter()
        found = (launch or in_a_process)(spec, candidate, batch)
        result.import_seconds.append(found["import_seconds"])
        result.build_seconds.append(found["build_seconds"])
        result.first_seconds.append(found["first_seconds"])
        result.peak_bytes.append(int(found["peak_bytes"]))
        result.imported_bytes.append(int(found["imported_bytes"]))
        if time.perf_counter() - start > LONG:
            break
    return result


def in_a_process(spec: Spec, candidate: str, batch: int) -> dict[str, float]:
    """What `stepfuse.bench.cold_start` prints."""
    job = json.dumps({"spec": asdict(spec), "candidate": candidate, "batch": batch})
    with tempfile.TemporaryDirectory() as empty:
        caches = {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
        done = subprocess.run(
            [sys.executable, "-m", "stepfuse.bench.cold_start", job],
            capture_output=True,
            text=True,
            env={**os.environ, **caches},
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ColdStartFailed(lines[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
