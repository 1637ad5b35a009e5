"""How much memory a candidate of `bench_unet` takes, each in a process of its own.

    python -m stepfuse.bench.unet_memory '{"candidate": "stepfuse-bf16", "batch": 1, ...}'

prints one JSON object: the resident set in bytes with everything imported, with the network built,
after the candidate was built, after a few evaluations, and the most that there ever was.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from rich.table import Table

from stepfuse.bench import peers_setup, unet_candidates
from stepfuse.bench.able import able, to_stderr
from stepfuse.bench.processes import answer, ask, held_bytes, peak_bytes

EVALUATIONS = 3
_COLUMNS = {"built": "after the build", "running": "running", "peak": "peak"}


def in_processes(names: list[str], job: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What each candidate takes; one that cannot run here is left out, with the reason printed."""
    asked = {
        name: functools.partial(ask, "stepfuse.bench.unet_memory", job | {"candidate": name})
        for name in names
    }
    return able(asked, lambda said: to_stderr(f"memory table: {said}"))


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
    peers_setup.prepare()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    unet_candidates.import_packages(job["candidate"])
    imported = held_bytes()
    with torch.no_grad():
        model, shape = unet_candidates.network(job["model"], job["config"], job["batch"])
        x, t = unet_candidates.inputs(shape)
        loaded = held_bytes()
        call = unet_candidates.maker(job["candidate"], model, x, t)()
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


if __name__ == "__main__":
    answer(measured)
