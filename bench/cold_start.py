"""The first images of a candidate, in a process that has just started; see `memory.cold_start`.

    python -m stepfuse.bench.cold_start '{"spec": {...}, "candidate": "stepfuse", "batch": 1}'

Prints one JSON object as its last line. Only the standard library is imported before the clock
starts; starting the interpreter itself (some 20 ms) is not counted.
"""

from __future__ import annotations

import time
from typing import Any

from stepfuse.bench.processes import answer, held_bytes, peak_bytes


def first_images(job: dict[str, Any]) -> dict[str, float]:
    """Import, build, and run the loop once."""
    start = time.perf_counter()
    import torch

    from stepfuse.bench import peers_setup
    from stepfuse.bench.candidates import entry
    from stepfuse.bench.tf32 import tf32_off
    from stepfuse.bench.workload import Spec, Workload

    chosen = entry(job["candidate"])
    if chosen.needs:
        peers_setup.prepare()
    chosen.import_packages()
    imported, imported_bytes = time.perf_counter(), held_bytes()
    spec = Spec(**job["spec"])
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    workload = Workload(spec)
    with tf32_off(workload.device):
        loop = chosen.build(workload, job["batch"])
        built = time.perf_counter()
        loop.images()
        if workload.device.type == "cuda":
            torch.cuda.synchronize(workload.device)
    ready = time.perf_counter()
    return {
        "import_seconds": imported - start,
        "build_seconds": built - imported,
        "first_seconds": ready - built,
        "peak_bytes": peak_bytes(),
        "imported_bytes": imported_bytes,
    }


if __name__ == "__main__":
    answer(first_images)
