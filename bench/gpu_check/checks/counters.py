"""The hardware's counters of four kernels, by Nsight Compute where it is installed."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from stepfuse.bench.gpu_check import capped, counted
from stepfuse.bench.gpu_check.check import Check, Context, Skipped

PLACES = (
    "/opt/nvidia/nsight-compute/*/ncu",
    "/usr/local/cuda*/bin/ncu",
    "/usr/local/NVIDIA-Nsight-Compute*/ncu",
)
PROGRAM = "stepfuse.bench.gpu_check.counted"
# as Nsight Compute has them, and as they are noted
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes.sum": "dram_bytes",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "sm__maximum_warps_per_active_cycle_pct": "possible_occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__waves_per_multiprocessor": "waves",
}
REFUSED = "ERR_NVGPUCTRPERM"
MARGIN_S, LINES = 2.0, 6
# of a unit, what it is in ours
SCALES = {"us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}
SCALES |= {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def run(context: Context) -> None:
    """One launch each, clocks as they are; note a row for every kernel."""
    if context.stands_in:
        raise Skipped("Nsight Compute counts on a GPU; there is none here")
    ncu = find()
    if ncu is None:
        raise Skipped(f"needs Nsight Compute: no ncu on the PATH or at {', '.join(PLACES)}")
    status, text = capped.run(command(ncu), context.seconds_left - MARGIN_S)
    if REFUSED in text:
        raise Skipped(f"{ncu} may not read this GPU's counters here ({REFUSED})")
    rows = parsed(text)
    last = text.splitlines()[-LINES:]
    if context.expect(bool(rows), f"{ncu} counted nothing: exit status {status}, {last}"):
        context.note("kernels", labelled(rows))
        context.note("command", " ".join(command(ncu)))
    else:
        context.note("last_lines", last)


def find(path: str | None = None, places: Iterable[str] = PLACES) -> str | None:
    """The newest ncu of ``places``, where there is none on the PATH."""
    found = shutil.which("ncu", path=path)
    if found:
        return found
    there = [p for place in places for p in Path("/").glob(place.lstrip("/")) if p.is_file()]
    return str(max(there)) if there else None


def command(ncu: str) -> list[str]:
    """What counts the kernels of `counted`."""
    return [
        ncu,
        "--clock-control=none",
        "--profile-from-start=off",
        f"--kernel-name=regex:^({'|'.join(counted.KERNELS)})$",
        f"--metrics={','.join(METRICS)}",
        "--csv",
        sys.executable,
        "-m",
        PROGRAM,
    ]


def parsed(text: str) -> list[dict[str, Any]]:
    """A row for each launch, from a table of one metric a line: kernel, grid, block, metrics.

    What else stands in the output is passed over.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        return []
    table = "\n".join(line for line in lines[start:] if line.startswith('"'))
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        launch = launches.setdefault(
            row["ID"],
            {"kernel": row["Kernel Name"], "grid": row["Grid Size"], "block": row["Block Size"]},
        )
        name = METRICS.get(row["Metric Name"])
        if name is not None:
            launch[name] = _number(row["Metric Value"], row["Metric Unit"])
    return list(launches.values())


def labelled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the case of each, where they are the kernels that were launched, in order."""
    expected = [
        (case.name, kernel)
        for case, kernels in counted.cases(torch.device("meta"))
        for kernel in kernels
    ]
    if [row["kernel"] for row in rows] != [kernel for _, kernel in expected]:
        return list(rows)
    return [{"case": name, **row} for (name, _), row in zip(expected, rows, strict=True)]


def _number(value: str, unit: str) -> float | str:
    try:
        return float(value.replace(",", "")) * SCALES.get(unit, 1)
    except ValueError:
        return value


CHECK = Check(
    "counters",
    "speed",
    40.0,
    run,
    "Share of the memory's bandwidth, L2 hits, occupancy and registers of four kernels, as the "
    "hardware counts them.",
)
