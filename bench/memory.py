"""Cold start and peak memory: the first images in processes that have just started."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict

from stepfuse.bench.processes import ask
from stepfuse.bench.record import ColdStart
from stepfuse.bench.workload import Spec

PROCESSES = 3
LONG = 20.0  # seconds after which one process is enough
Launch = Callable[[Spec, str, int], dict[str, float]]


def cold_start(
    spec: Spec,
    candidate: str,
    batch: int,
    processes: int = PROCESSES,
    launch: Launch | None = None,
) -> ColdStart:
    """The figures of up to ``processes`` processes, one after the other.

    Files that have been read before come from the system's cache. torch.compile's own cache is
    empty each time. Raises `ProcessFailed`.
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
    job = {"spec": asdict(spec), "candidate": candidate, "batch": batch}
    with tempfile.TemporaryDirectory() as empty:
        caches = {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
        return ask("stepfuse.bench.cold_start", job, **caches)
