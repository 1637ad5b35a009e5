"""What changed between two records, beyond what their samples scatter.

stepfuse bench --compare a.json b.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from rich.console import Group
from rich.markup import escape

from stepfuse.bench import units
from stepfuse.bench.gate import benchmarks
from stepfuse.bench.grid import Grid
from stepfuse.bench.grids import timed
from stepfuse.bench.machine import busy
from stepfuse.bench.record import Candidate, Record
from stepfuse.bench.significance import (
    CONFIDENCE,
    FEW,
    SAME,
    SAME_OF_FEW,
    WITHIN,
    Ratio,
    ratio_of_medians,
)

# What makes another machine, and another task, of the fields of a record.
_MACHINE = ("processor", "device", "cores", "logical_cores", "threads", "isa", "os", "python")
_NOT_THE_TASK = ("batches", "rounds", "time_limit", "dtypes")  # found row by row

LATENCY = "latency"
_NO_TIME = ("peak memory", "energy")

Shown = Callable[[float], str]
Samples = dict[tuple[str, str, str], tuple[Shown, list[float]]]


@dataclass(frozen=True)
class Row:
    """One figure of one candidate in both records.

    Attributes:
        candidate: its name.
        figure: "latency", "latency, N steps", "back to back" (the time of an image), "cold start",
            "peak memory", "energy" (of an image), or in suites "beside REFERENCE".
        where: batch size, if any.
        a, b: the medians, with their units.
        change: b over a: above 1, b takes longer or more.
        ours: whether the candidate is ours.
    """

    candidate: str
    figure: str
    where: str
    a: str
    b: str
    change: Ratio
    ours: bool

    @property
    def changed(self) -> bool:
        """By more than the samples scatter."""
        return self.change.verdict != WITHIN

    @property
    def verdict(self) -> str:
        """In words that fit the figure."""
        words = {"slower": "more", "faster": "less"} if self.figure in _NO_TIME else {}
        return words.get(self.change.verdict, self.change.verdict)


@dataclass
class Comparison:
    """Two records side by side.

    Attributes:
        rows: every figure that both have.
        only_a, only_b: candidates that the other record lacks, with the reason where it has one.
        warnings: why a difference may have nothing to do with the program.
        sides: what was run, when and where.
        not_in_both: figures of candidates in both that one record lacks.
    """

    rows: list[Row]
    only_a: list[str]
    only_b: list[str]
    warnings: list[str]
    sides: tuple[str, str]
    not_in_both: list[str]

    def _grid(self) -> Grid:
        """Every latency, and of the rest what changed."""
        grid = Grid(
            "b over a: above 1, b takes longer or more",
            ["<candidate", "<figure", "<at", "a", "b", "b / a", f"{CONFIDENCE:.0%} interval", "<"],
            caption="Ratios of medians, intervals by resampling both runs. A change under "
            f"{SAME:.0%} ({SAME_OF_FEW:.0%} with fewer than {FEW} samples) is not told from the "
            "difference between two runs of one program.",
        )
        for row in self.rows:
            if row.changed or row.figure.startswith(LATENCY):
                change = row.change
                cells = [row.candidate, row.figure, row.where, row.a, row.b, f"{change.value:.2f}"]
                interval = f"{change.low:.2f} to {change.high:.2f}"
                grid.add([*cells, interval, row.verdict], row.changed)
        return grid

    def _lines(self) -> Iterator[str]:
        yield f"a: {self.sides[0]}"
        yield f"b: {self.sides[1]}"
        for warning in self.warnings:
            yield f"warning: {warning}"

    def _ending(self) -> Iterator[str]:
        for side, names in (("a", self.only_a), ("b", self.only_b)):
            if names:
                yield f"only in {side}: {', '.join(names)}"
        if self.not_in_both:
            yield f"in one of the two only: {'; '.join(self.not_in_both)}"
        slower, faster = (
            sum(row.change.verdict == verdict for row in self.rows)
            for verdict in ("slower", "faster")
        )
        within = len(self.rows) - slower - faster
        yield (
            f"{len(self.rows)} figures in both: {faster} faster or less, {slower} slower or more, "
            f"{within} within the spread (listed if latencies)."
        )

    def table(self) -> Group:
        """For `rich.console.Console.print`."""
        texts = [[escape(line) for line in part] for part in (self._lines(), self._ending())]
        grid = self._grid()
        middle = ["", grid.rich()] if grid.rows else []
        return Group(*texts[0], *middle, *texts[1])

    def markdown(self) -> str:
        """Lines, a pipe table, and what is not in both."""
        grid = self._grid()
        middle = [grid.markdown().rstrip("\n")] if grid.rows else []
        return "\n\n".join([*self._lines(), *middle, *self._ending()]) + "\n"


def compare(a: Record, b: Record) -> Comparison:
    """What both records have, figure by figure, in the order of ``a``.

    Raises ValueError for records of different kinds, or without anything that was timed.
    """
    if a.kind != b.kind or a.kind == "roofline":
        raise ValueError(
            f"two records of kind 'sampler' or two of kind 'suite' can be compared; got "
            f"{a.kind!r} and {b.kind!r}"
        )
    ours = {c.name for record in (a, b) for c in record.candidates if c.ours}
    lengths = [r.settings.steps for r in (a, b) if r.settings]
    usual = lengths[0] if lengths and lengths == lengths[:1] * 2 else 0  # else steps are named
    before, after = _figures(a, usual), _figures(b, usual)
    rows = []
    for key in (key for key in before if key in after):
        (shown, old), (_, new) = before[key], after[key]
        medians = [shown(statistics.median(samples)) for samples in (old, new)]
        own = key[0] in ours
        rows.append(Row(*key, *medians, ratio_of_medians(new, old), own))
    names = [list(dict.fromkeys(key[0] for key in figures)) for figures in (before, after)]
    alone = [
        " ".join(part for part in key if part)
        for key in [*before, *after]
        if (key in before) != (key in after) and key[0] in names[0] and key[0] in names[1]
    ]
    return Comparison(
        rows,
        [_missing(name, b) for name in names[0] if name not in names[1]],
        [_missing(name, a) for name in names[1] if name not in names[0]],
        [*_warnings(a, b), *_drift(rows)],
        (_side(a), _side(b)),
        alone,
    )


def _missing(name: str, record: Record) -> str:
    """A candidate that ``record`` lacks, and why."""
    reasons = [c.failure for c in record.candidates if c.name == name and c.failure]
    return f"{name} (the other: {reasons[0]})" if reasons else name


def _figures(record: Record, usual: int) -> Samples:
    """(candidate, figure, where) -> how its unit is written, and the samples."""
    found: Samples = {}
    for c in timed(record):
        for figure, batch, shown, samples in _of(c, usual):
            if samples and min(samples) > 0:
                found[c.name, figure, f"batch {batch}"] = shown, samples
    for name, beside in benchmarks(record.suite).items():
        found[name, f"beside {beside.reference}", ""] = units.digits, list(beside.ratios)
    return found


def _of(c: Candidate, usual: int) -> Iterator[tuple[str, int, Shown, list[float]]]:
    """Figure, batch, unit and samples; steps are named where they are not the usual number."""
    for runs in (*c.latency, *c.over_steps):
        figure = LATENCY if runs.steps == usual else f"{LATENCY}, {runs.steps} steps"
        yield figure, runs.batch, units.seconds, runs.seconds
    for w in c.throughput:
        each = [s / n for s, n in zip(w.seconds, w.images, strict=True)]
        steps = "" if w.steps == usual else f", {w.steps} steps"
        yield f"back to back{steps}", w.batch, units.seconds, each
    if cold := c.cold_start:
        parts = zip(cold.import_seconds, cold.build_seconds, cold.first_seconds, strict=False)
        yield "cold start", cold.batch, units.seconds, [sum(part) for part in parts]
        yield "peak memory", cold.batch, units.size, [float(n) for n in cold.peak_bytes]
    if c.energy:
        yield "energy", c.energy.batch, units.joules, c.energy.joules_per_image


def _side(record: Record) -> str:
    m = record.machine
    return f"{m.date}, commit {m.commit or 'unknown'}, {m.processor}, {record.command}"


def _warnings(a: Record, b: Record) -> Iterator[str]:
    """Why a difference may have nothing to do with the program."""
    for name in _MACHINE:
        old, new = getattr(a.machine, name), getattr(b.machine, name)
        if old != new:
            yield f"the machines differ: {name} is {old} in a, {new} in b"
    old_versions, new_versions = a.machine.versions, b.machine.versions
    for package in sorted({*old_versions, *new_versions} - {"stepfuse"}):
        old, new = old_versions.get(package, "not there"), new_versions.get(package, "not there")
        if old != new:
            yield f"the versions differ: {package} is {old} in a, {new} in b"
    settings = [{} if r.settings is None else asdict(r.settings) for r in (a, b)]
    for name in settings[0]:
        old, new = settings[0][name], settings[1].get(name)
        if name not in _NOT_THE_TASK and old != new:
            yield f"the settings differ: {name} is {old} in a, {new} in b"
    for side, record in (("a", a), ("b", b)):
        if busy(record.machine):
            yield f"{side} was taken on a busy machine: load {record.machine.load:.1f} at the start"
        if not record.complete:
            yield f"{side} was ended early"


def _drift(rows: list[Row]) -> Iterator[str]:
    """Peers are the same program in both runs: where they moved, the machine did."""
    changes = [r.change.value for r in rows if not r.ours and r.figure.startswith(LATENCY)]
    if changes and abs(statistics.median(changes) - 1) > SAME:
        yield (
            f"the peers' latency changed too, by a factor of {statistics.median(changes):.2f} in "
            "the median: judge ours by its ratio to them"
        )
