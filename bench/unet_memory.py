"""How much memory a candidate of `bench_unet` takes, each in a process of its own.

    python -m stepfuse.bench.unet_memory '{"candidate": "stepfuse-bf16", "batch": 1, ...}'

prints one JSON object: the resident set in bytes with everything imported, with the network built,
after the candidate was built, after a few evaluations, and the most that there ever was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from stepfuse.bench.cold_start import held_bytes, peak_bytes

EVALUATIONS = 3
_COLUMNS = {"built": "after the build", "running": "running", "peak": "peak"}


def in_processes(names: list[str], job: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What each candidate takes; one that cannot run here is left out, with the reason printed."""
    found = {}
    for name in names:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "stepfuse.bench.unet_memory",
                json.dumps(job | {"candidate": name}),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            Console(stderr=True).print(f"{name} left out of the memory table: {lines[-1][:200]}")
        else:
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, dict[str, int]], batch: int) -> Table:
    """In MB, and the peak beside eager's."""
    result = Table(title=f"resident set of a process of its own, batch {batch}, MB")
    result.add_column("candidate")
    for heading in (*_COLUMNS.values(), "peak / eager", "on top of imports"):
        result.add_column(heading, justify="right")
    eager = found.get("eager")
    for name, row in found.items():
        against = f"{row['peak'] / eager['peak']:.2f}" if eager else ""
        figures = [f"{row[key] / 2**20:.0f}" for key in _COLUMNS]
        result.add_row(name, *figures, against, f"{(row['running'] - row['imported']) / 2**20:.0f}")
    return result


def measured(job: dict[str, Any]) -> dict[str, int]:
    """Import, build, evaluate; the job as `bench_unet` describes it."""
    import torch

    from stepfuse.bench import bench_unet, peers_setup

    peers_setup.prepare()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    bench_unet.import_packages(job["candidate"])
    imported = held_bytes()
    with torch.no_grad():
        model, shape = bench_unet.network(job["model"], job["config"], job["batch"])
        x, t = bench_unet.inputs(shape)
        loaded = held_bytes()
        call = bench_unet.maker(job["candidate"], model, x, t)()
        built = held_bytes()
        for _ in range(EVALUATIONS):
            call(x, t)
    return {
        "imported": imported,
        "loaded": loaded,
        "built": built,
        "running": held_bytes(),
        "peak": peak_bytes(),
    }


def main() -> None:
    """The job is the only argument."""
    # libraries may write to the standard output: it is theirs, the result goes to a copy of it
    with os.fdopen(os.dup(1), "w") as result:
        os.dup2(2, 1)
        print(json.dumps(measured(json.loads(sys.argv[1]))), file=result)


if __name__ == "__main__":
    main()
