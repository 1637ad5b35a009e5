"""Stop a change that makes something slower: two files of the suites, one before and one after.

    python -m pytest bench --benchmark-only --benchmark-json FILE
    python -m stepfuse.bench.gate BEFORE AFTER [--allow 1.15] [--missing-ok]

Times are not compared: a benchmark fails by its ratio to the reference that took turns with it in
the same run. It fails where that ratio has grown by more than the factor ``--allow`` and by more
than its samples scatter. Exit status 0: nothing is slower; 1: something is, or a benchmark is
gone; 2: a file cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stepfuse.bench.record import Timing
from stepfuse.bench.samples import ratios
from stepfuse.bench.significance import CONFIDENCE, Ratio, ratio_of_medians
from stepfuse.bench.suite_file import read

ALLOWED = 1.15


@dataclass(frozen=True)
class Beside:
    """One benchmark of a file: its time over its reference's, round by round."""

    reference: str
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Finding:
    """One benchmark in both files: ``change`` above 1 is slower, beside its reference."""

    name: str
    reference: str
    change: Ratio
    failed: bool


def benchmarks(timings: Sequence[Timing]) -> dict[str, Beside]:
    """Every candidate that has a reference in its group, by "suite: group: name"."""
    groups = {(t.suite, t.group, t.name): t for t in timings}
    found = {}
    for t in timings:
        reference = groups.get((t.suite, t.group, t.reference))
        if reference is None or reference is t:
            continue
        pairs = tuple(ratios(t.seconds, reference.seconds))
        found[f"{t.suite}: {t.group}: {t.name}"] = Beside(t.reference, pairs)
    return found


def compare(
    before: Mapping[str, Beside], after: Mapping[str, Beside], allow: float = ALLOWED
) -> list[Finding]:
    """What both have, worst first; ValueError where ``allow`` or a reference does not fit."""
    if not allow >= 1:
        raise ValueError(f"allow must be a factor of at least 1; got {allow}")
    found = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old.reference != new.reference:
            raise ValueError(
                f"{name} was timed beside {old.reference!r} before and {new.reference!r} after: "
                f"these ratios cannot be compared; take both files with the same suites"
            )
        change = ratio_of_medians(new.ratios, old.ratios)
        failed = change.value > allow and change.low > 1
        found.append(Finding(name, new.reference, change, failed))
    return sorted(found, key=lambda finding: (-finding.change.value, finding.name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the result is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stepfuse.bench.gate", description=__doc__)
    parser.add_argument("before", type=Path, help="file of the suites to compare with")
    parser.add_argument("after", type=Path, help="file of the suites to judge")
    parser.add_argument(
        "--allow",
        type=float,
        default=ALLOWED,
        metavar="FACTOR",
        help=f"how much a ratio may grow (default {ALLOWED})",
    )
    parser.add_argument(
        "--missing-ok", action="store_true", help="benchmarks that are only in BEFORE do not fail"
    )
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        before, after = benchmarks(read(options.before)), benchmarks(read(options.after))
        found = compare(before, after, options.allow)
        if not found:
            raise ValueError(f"{options.before} and {options.after} have no benchmark in common")
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    console.print(_table(found, options.allow))
    missing, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    for title, names in (("only in BEFORE", missing), ("only in AFTER", new)):
        for name in names:
            console.print(f"{title}: {name}", markup=False, highlight=False)
    slower = sum(finding.failed for finding in found)
    gone = 0 if options.missing_ok else len(missing)
    console.print(f"{len(found)} compared, {slower} slower beyond {options.allow:g}, {gone} gone")
    return 1 if slower or gone else 0


def _table(found: Sequence[Finding], allow: float) -> Table:
    table = Table(title=f"time over the reference's, after / before; fails above {allow:g}")
    for heading in ("benchmark", "beside"):
        table.add_column(heading, overflow="fold")
    for heading in ("change", f"{CONFIDENCE:.0%} interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for finding in found:
        change = finding.change
        table.add_row(
            escape(finding.name),
            finding.reference,
            f"{change.value:.2f}",
            f"{change.low:.2f} to {change.high:.2f}",
            "SLOWER" if finding.failed else change.verdict,
            style="bold red" if finding.failed else None,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
