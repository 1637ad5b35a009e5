"""The tables of a record: for the terminal, and as Markdown.

    python -m stepfuse.bench.tables RECORD... [--only summary,ratios]
    python -m stepfuse.bench.tables --write README.md

The second form fills every place of a document that begins with `<!-- from: RECORD summary -->`
and ends with `<!-- end -->`, RECORD beside the document, with the tables that are named: a figure
there comes from a file that is kept, and a test compares the two.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from stepfuse.bench import grids as loops
from stepfuse.bench import units
from stepfuse.bench.grid import Grid
from stepfuse.bench.record import Record, Timing, load
from stepfuse.bench.samples import ratios
from stepfuse.bench.suite_file import OURS
from stepfuse.engine.files.writing import write_file

_PLACE = re.compile(r"(<!-- from: (\S+)((?: [\w-]+)*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def print_tables(record: Record, console: Console) -> None:
    """Everything that is in a record: what it was taken on, the tables, the notes."""
    for line in described(record):
        console.print(escape(line), highlight=False)
    for grid in grids(record):
        console.print()
        console.print(grid.rich())


def markdown(record: Record, only: Sequence[str] = ()) -> str:
    """The same as Markdown; ``only`` names some of `TABLES`. ValueError for another name."""
    lines = described(record)
    return "\n\n".join(lines) + "\n\n" + "\n".join(g.markdown() for g in grids(record, only))


def grids(record: Record, only: Sequence[str] = ()) -> Iterator[Grid]:
    """The tables that have rows, in the order of `TABLES`."""
    unknown = sorted(set(only) - set(TABLES))
    if unknown:
        raise ValueError(f"no table is named {unknown[0]!r}; accepted: {', '.join(TABLES)}")
    for name, make in TABLES.items():
        if name in only or (not only and name != "summary"):
            yield from (grid for grid in make(record) if grid.rows)


def described(record: Record) -> list[str]:
    """The task, the machine and the notes, a line each."""
    lines = [*_task(record), _machine(record)]
    if not record.complete:
        lines.append("This run was ended early: some figures are missing, or have few samples.")
    return lines + record.notes


def _task(record: Record) -> list[str]:
    s = record.settings
    if s is None:
        return []
    shape = "x".join(map(str, s.shape))
    told = f", {s.condition}" if s.condition else ""
    return [
        f"{s.model}: {s.parameters / 1e6:.1f} M parameters, images {shape}{told}; {s.method}, "
        f"{s.steps} steps ({s.spacing}), eta {s.eta:g}, backend {s.backend}, graph {s.graph}, "
        f"{'optimised' if s.optimize else 'plain'} network; {s.rounds} rounds at most, seed "
        f"{s.seed}."
    ]


def _machine(record: Record) -> str:
    m = record.machine
    cores = units.count(m.cores or m.logical_cores, "core")
    cores += f" ({m.logical_cores} logical)" if m.cores not in (None, m.logical_cores) else ""
    threads = units.count(m.threads, "thread")
    memory = f", {units.size(m.memory_bytes)}" if m.memory_bytes else ""
    device = "" if m.device == "cpu" else f", {m.device}"
    load = "" if m.load is None else f", load {m.load:.1f} at the start"
    versions = ", ".join(f"{name} {version}" for name, version in m.versions.items())
    return (
        f"{m.processor}{device}, {threads} on {cores}{memory}, {m.isa}, {m.os}, Python "
        f"{m.python}{load}; {versions}; commit {m.commit or 'unknown'}, {m.date}."
    )


def _suites(record: Record) -> Iterator[Grid]:
    groups: dict[str, list[Timing]] = {}
    for timing in record.suite:
        groups.setdefault(timing.suite, []).append(timing)
    for suite, timings in groups.items():
        grid = Grid(
            f"Suite {suite}",
            ["<group", "<candidate", "<dtype", "median", "times the reference", "GB/s"],
            caption="Ratios pair by pair to the reference of the group; below 1 is faster.",
        )
        found = {(t.group, t.name): t for t in timings}
        for t in timings:
            base = found.get((t.group, t.reference))
            pairs = ratios(t.seconds, base.seconds) if base else []
            median = statistics.median(t.seconds)
            grid.add(
                [
                    t.group,
                    t.name + (" (reference)" if t is base else ""),
                    t.dtype,
                    units.seconds(median),
                    f"{statistics.median(pairs):.2f}" if pairs else loops.NO_FIGURE,
                    units.digits(t.bytes / median / 1e9) if t.bytes else loops.NO_FIGURE,
                ],
                t.name == OURS,
            )
        yield grid


def _roofline(record: Record) -> Iterator[Grid]:
    cards = sorted({(row["arch"], row["card"]) for row in record.roofline})
    for arch, card in cards:
        rows = [row for row in record.roofline if row["arch"] == arch]
        grid = Grid(
            f"Fused ops compiled for {card} (sm_{arch}): never run, bounds by memory bandwidth",
            ["<variant", "registers", "shared", "vector", "B/element", "us at least", "us unfused"],
            caption=f"Bytes by {rows[0]['gigabytes_per_second']} GB/s of the datasheet; unfused: "
            "PyTorch's operators one by one.",
        )
        for row in rows:
            unfused = row["unfused_microseconds"]
            grid.add(
                [
                    row["variant"],
                    " ".join(map(str, row["registers"])) + (" spills" if row["spilled"] else ""),
                    units.size(max(row["shared_bytes"], default=0)),
                    f"{row['vector_bits']} bit",
                    f"{row['bytes_per_element']:g}",
                    f"{row['microseconds']:.2f}",
                    loops.NO_FIGURE if unfused is None else f"{unfused:.2f}",
                ]
            )
        yield grid


TABLES: dict[str, Callable[[Record], Iterator[Grid]]] = {
    "summary": loops.summary,
    "verification": loops.verification,
    "latency": loops.latency,
    "ratios": loops.peers,
    "throughput": loops.throughput,
    "steps": loops.steps,
    "split": loops.split,
    "cold": loops.cold,
    "energy": loops.energy,
    "left-out": loops.left_out,
    "suites": _suites,
    "roofline": _roofline,
}


def filled(text: str, folder: Path) -> str:
    """A document with its places filled from the records that they name, beside ``folder``.

    A place that is empty stays so where there is no such record yet: it shows no figure.
    ValueError for a place without an end, for a table that there is not, or for a file that is no
    record; OSError where a record cannot be read.
    """

    def fill(place: re.Match[str]) -> str:
        start, name, only, figures, end = place.groups()
        if not figures.strip() and not (folder / name).exists():
            return place.group()
        return f"{start}{markdown(load(folder / name), only.split())}{end}"

    result, count = _PLACE.subn(fill, text)
    if count != text.count("<!-- from: "):
        raise ValueError("a place that begins with '<!-- from: RECORD -->' has no '<!-- end -->'")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the result is the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stepfuse.bench.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--only", default="", help=f"some of {','.join(TABLES)}")
    parser.add_argument("--write", action="store_true", help="FILEs are documents to be filled")
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    try:
        for path in options.files:
            if options.write:
                text = filled(path.read_text(encoding="utf-8"), path.parent)
                write_file(path, text.encode())
            else:
                print(f"<!-- from: {path}{''.join(f' {name}' for name in only)} -->")
                print(markdown(load(path), only), end="")
                print("<!-- end -->\n")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
