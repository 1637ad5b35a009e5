"""The first images of a candidate, in a process that has just started; see `memory.cold_start`.

    python -m stepfuse.bench.cold_start '{"spec": {...}, "candidate": "stepfuse", "batch": 1}'

Prints one JSON object as its last line. Only the standard library is imported before the clock
starts; starting the interpreter itself (some 20 ms) is not counted.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def first_images(job: dict[str, Any]) -> dict[str, float]:
    """Import, build, and run the loop once."""
    start = time.perf_counter()
    import torch

    from stepfuse.bench import peers_setup
    from stepfuse.bench.candidates import entry
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


def main() -> None:
    """The job is the only argument."""
    # libraries may write to the standard output: it is theirs, the result goes to a copy of it
    with os.fdopen(os.dup(1), "w") as result:
        os.dup2(2, 1)
        print(json.dumps(first_images(json.loads(sys.argv[1]))), file=result)


if __name__ == "__main__":
    main()
