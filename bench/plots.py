"""The pictures of a record: each a figure with a title, and a line on how to read it."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepfuse.bench import svg
from stepfuse.bench.gate import benchmarks
from stepfuse.bench.grids import batches, named, over_steps, timed
from stepfuse.bench.record import Candidate, Record
from stepfuse.bench.samples import percentile, ratios
from stepfuse.bench.suite_file import OURS

MARKERS = "osD^vPXd"
PARTS = ("network", "update", "rest")
LONGEST, WIDEST = 30, 21  # letters of a label, and of one of two beside each other
_CHART = 235  # points of a chart of lines and its axis
_ROW = 27  # points of a row of bars or dots
_AXIS = 62  # points of the axis below them


@dataclass(frozen=True)
class Plot:
    """``svg`` is an element to stand in a page; ``name`` begins its ids."""

    name: str
    title: str
    note: str
    svg: str

    def html(self) -> str:
        """A figure with its title above and its note below."""
        return (
            f'<figure id="plot-{self.name}"><h3>{html.escape(self.title)}</h3>\n{self.svg}'
            f"<figcaption>{html.escape(self.note)}</figcaption></figure>\n"
        )


@dataclass(frozen=True)
class Series:
    """How a candidate looks, the same in every plot."""

    label: str
    colour: str
    marker: str
    width: float


def plots(record: Record, roofline: Sequence[dict[str, Any]] = ()) -> list[Plot]:
    """Every plot for which the record has figures; ``roofline`` adds that of the fused ops."""
    made = [
        plot
        for draw in (_ratios, _steps, _throughput, _latencies, _split, _suites)
        if (plot := draw(record)) is not None
    ]
    bound = _roofline(roofline or record.roofline)
    return [*made, *([bound] if bound else [])]


def looks(record: Record) -> dict[str, Series]:
    """Ours in strong colours, peers in quiet ones, and a marker for who sees no colours."""
    found = {}
    counts = {True: 0, False: 0}
    for n, c in enumerate(timed(record)):
        colours = svg.OURS if c.ours else svg.PEERS
        colour = colours[counts[c.ours] % len(colours)]
        counts[c.ours] += 1
        found[c.name] = Series(
            _short(named(c)), colour, MARKERS[n % len(MARKERS)], 2.0 if c.ours else 1.4
        )
    return found


def _steps(record: Record) -> Plot | None:
    lines = {c.name: over_steps(record, c) for c in timed(record)}
    lines = {name: runs for name, runs in lines.items() if len(runs) > 1}
    if not lines or record.settings is None:
        return None
    batch = record.settings.batches[0]
    title = f"Latency over steps, batch {batch}"
    height = _CHART + _legend_height([looks(record)[name] for name in lines])
    with svg.figure(height, "steps", f"{title}: a line a candidate, seconds") as made:
        canvas, axes, out = made
        for name, runs in lines.items():
            points = [(r.steps, r.seconds) for r in runs]
            _line(axes, looks(record)[name], points)
        axes.set(xlabel="steps of the loop", ylabel="seconds for the whole loop")
        _from_zero(axes, x=True)
        _legend(canvas, axes)
    note = "Straight through zero where every step costs the same. Bars: middle half of the runs."
    return Plot("steps", title, note, out[0])


def _throughput(record: Record) -> Plot | None:
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    sizes = sorted({w.batch for c in timed(record) for w in c.throughput if w.seconds})
    for c in timed(record):
        points = [
            (float(sizes.index(w.batch)), [n / s for n, s in zip(w.images, w.seconds, strict=True)])
            for w in sorted(c.throughput, key=lambda w: w.batch)
            if w.seconds
        ]
        if points:
            lines[c.name] = points
    if len(sizes) < 2:
        return None
    title = "Throughput over batch size"
    height = _CHART + _legend_height([looks(record)[name] for name in lines])
    what = f"{title}: images a second, a line a candidate"
    with svg.figure(height, "throughput", what) as made:
        canvas, axes, out = made
        for name, points in lines.items():
            _line(axes, looks(record)[name], points)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set(xlabel="images of a batch", ylabel="images a second")
        axes.margins(x=0.08)
        _from_zero(axes)
        _legend(canvas, axes)
    note = "Loops one right after the other; higher is better. Batch sizes are not to scale."
    return Plot("throughput", title, note, out[0])


def _unit(most: float) -> tuple[float, str]:
    """In what an axis counts whose longest time is ``most``: the factor, and its name."""
    if most >= 10:
        return 1.0, "seconds"
    return (1e3, "milliseconds") if most >= 1e-3 else (1e6, "microseconds")


def _columns(labels: Sequence[str]) -> int:
    """Of a legend that fits the width of a plot."""
    return 1 if max(map(len, labels), default=0) > WIDEST else 2


def _legend_height(series: Sequence[Series]) -> float:
    """Points of the legend below a plot."""
    labels = [look.label for look in series]
    return 18.0 * -(-len(labels) // _columns(labels))


def _line(axes: Any, look: Series, points: Sequence[tuple[float, list[float]]]) -> None:
    """Medians joined by a line; a bar from the first to the third quarter of the samples."""
    x = [place for place, _ in points]
    y = [statistics.median(samples) for _, samples in points]
    below = [m - percentile(s, 25) for m, (_, s) in zip(y, points, strict=True)]
    above = [percentile(s, 75) - m for m, (_, s) in zip(y, points, strict=True)]
    axes.errorbar(
        x, y, [below, above], label=look.label, color=look.colour, marker=look.marker,
        markersize=5, linewidth=look.width, elinewidth=1.2,
    )  # fmt: skip


def _latencies(record: Record) -> Plot | None:
    sizes = batches(record)
    if not sizes:
        return None
    batch = sizes[0]
    rows = [(c, r) for c in timed(record) if (r := c.runs(batch)) and r.seconds]
    title = f"Every run, batch {batch}"
    factor, unit = _unit(max(max(runs.seconds) for _, runs in rows) / batch)
    what = f"{title}: {unit} an image, a row of dots a candidate"
    with svg.figure(_ROW * len(rows) + _AXIS, "latencies", what) as (_, axes, out):
        for y, (c, runs) in enumerate(rows):
            look = looks(record)[c.name]
            x = [factor * s / batch for s in runs.seconds]
            jitter = [y + 0.22 * ((7 * i) % 11 / 5 - 1) for i in range(len(x))]
            axes.scatter(x, jitter, s=15, color=look.colour, alpha=0.6, linewidths=0)
            axes.vlines(statistics.median(x), y - 0.36, y + 0.36, color=svg.INK, linewidth=1.6)
        _rows(axes, [named(c) for c, _ in rows])
        axes.set(xlabel=f"{unit} an image")
        axes.set_xlim(left=0)
    note = "A dot is a run, the line their median. Dots far to the right are a disturbed machine."
    return Plot("latencies", title, note, out[0])


def _ratios(record: Record) -> Plot | None:
    own = [c for c in timed(record) if c.ours]
    rows = [
        (peer, batch, theirs)
        for peer in timed(record)
        if not peer.ours
        for batch in batches(record)
        if (theirs := peer.runs(batch)) and theirs.seconds
    ]
    found = [_pairs(own, batch, theirs.steps, theirs.seconds) for _, batch, theirs in rows]
    if not any(found):
        return None
    title = "How many times longer the peers take"
    what = f"{title} than ours, pair by pair; above 1 ours is faster"
    height = _ROW * len(rows) + _AXIS + _legend_height([looks(record)[c.name] for c in own])
    with svg.figure(height, "ratios", what) as (canvas, axes, out):
        for c in own:
            look = looks(record)[c.name]
            places = [(y, pairs[c.name]) for y, pairs in enumerate(found) if c.name in pairs]
            for y, pairs in places:
                axes.hlines(
                    y, percentile(pairs, 25), percentile(pairs, 75),
                    color=look.colour, linewidth=4, alpha=0.45,
                )  # fmt: skip
            axes.plot(
                [statistics.median(pairs) for _, pairs in places], [y for y, _ in places],
                look.marker, color=look.colour, markersize=6, label=look.label,
            )  # fmt: skip
        axes.axvline(1, color=svg.INK, linewidth=1.2)
        _rows(axes, [f"{named(peer)}, batch {batch}" for peer, batch, _ in rows])
        axes.set(xlabel="times longer (1: equal)")
        axes.set_xlim(left=0)
        _legend(canvas, axes)
    note = (
        "Than ours, see the legend. Dots: median of the ratios of runs one after the other; bars: "
        "the middle half of them. Right of the line ours is faster. Compare equal precisions first."
    )
    return Plot("ratios", title, note, out[0])


def _pairs(
    own: Sequence[Candidate], batch: int, steps: int, theirs: Sequence[float]
) -> dict[str, list[float]]:
    found = {}
    for c in own:
        runs = c.runs(batch)
        if runs and runs.steps == steps and (pairs := ratios(theirs, runs.seconds)):
            found[c.name] = pairs
    return found


def _split(record: Record) -> Plot | None:
    rows = [
        (c, [statistics.median(getattr(c.split, part)) for part in PARTS])
        for c in record.candidates
        if c.split and all(getattr(c.split, part) for part in PARTS)
    ]
    if not rows:
        return None
    title = "Where a step's time goes"
    factor, unit = _unit(max(sum(times) for _, times in rows))
    rows = [(c, [factor * time for time in times]) for c, times in rows]
    what = f"{title}: {unit} in the network, the update and the rest, a bar a candidate"
    with svg.figure(_ROW * len(rows) + _AXIS + 20, "split", what) as (canvas, axes, out):
        colours = (svg.PEERS[0], svg.OURS[0], svg.OURS[1])
        starts = [0.0] * len(rows)
        for n, (part, colour) in enumerate(zip(PARTS, colours, strict=True)):
            widths = [times[n] for _, times in rows]
            axes.barh(range(len(rows)), widths, 0.62, starts, color=colour, label=part)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for y, (_, times) in enumerate(rows):
            share = 1 - times[0] / sum(times)
            axes.annotate(
                f"{share:.1%}", (sum(times), y), (5, 0), textcoords="offset points", va="center"
            )
        _rows(axes, [named(c) for c, _ in rows])
        axes.set(xlabel=f"{unit} of a step")
        axes.set_xlim(0, 1.16 * max(starts))
        _legend(canvas, axes, columns=3)
    note = "The figure beside a bar is what is not the network: all that a sampler can save."
    return Plot("split", title, note, out[0])


def _suites(record: Record) -> Plot | None:
    rows: dict[str, list[float]] = {}
    for name, beside in benchmarks(record.suite).items():
        suite, group, candidate = name.split(": ", 2)
        if candidate == OURS:
            what = group.partition("[")[0].partition(" ")[0]
            label = what if suite == "kernels" else suite
            rows.setdefault(label, []).append(1 / statistics.median(beside.ratios))
    if not rows:
        return None
    title = "Suites: times faster than the reference"
    with svg.figure(_ROW * len(rows) + _AXIS, "suites", f"{title}, a dot a case") as (_, axes, out):
        for y, faster in enumerate(rows.values()):
            jitter = [y + 0.22 * ((7 * i) % 11 / 5 - 1) for i in range(len(faster))]
            axes.scatter(faster, jitter, s=16, color=svg.OURS[0], alpha=0.6, linewidths=0)
            middle = statistics.median(faster)
            axes.vlines(middle, y - 0.36, y + 0.36, color=svg.INK, linewidth=1.6)
        axes.axvline(1, color=svg.INK, linewidth=1.0, linestyle=(0, (3, 3)))
        _rows(axes, list(rows))
        axes.set(xlabel="times faster (1: equal)")
        axes.set_xlim(left=0)
    note = (
        "A dot is a shape, layout and precision; the line is their median. References: see below."
    )
    return Plot("suites", title, note, out[0])


def _roofline(rows: Sequence[dict[str, Any]]) -> Plot | None:
    if not rows:
        return None
    arch = next((row["arch"] for row in rows if row["arch"] == 90), rows[0]["arch"])
    rows = [row for row in rows if row["arch"] == arch and "odd size" not in row["variant"]]
    card, speed = rows[0]["card"], rows[0]["gigabytes_per_second"]
    title = f"Fused ops on {card}: what its memory allows"
    what = f"{title}: microseconds at least, fused and as separate operators, two bars an op"
    with svg.figure(47 * len(rows) + _AXIS + 20, "roofline", what) as (canvas, axes, out):
        for y, row in enumerate(rows):
            unfused, fused = row["unfused_microseconds"], row["microseconds"]
            if unfused is not None:
                axes.barh(y + 0.27, unfused, 0.3, color=svg.RULE, label=_once(axes, "unfused"))
            axes.barh(y + 0.27, fused, 0.3, color=svg.OURS[0], label=_once(axes, "fused"))
            op, _, shape = row["variant"].rpartition(", ")
            lines = ((op or shape, 0.3, svg.INK), (shape if op else "", 0.03, svg.MUTED))
            for text, above, colour in lines:
                axes.annotate(
                    text, (0, y - above), (1, 0), color=colour,
                    textcoords="offset points", fontsize=svg.TEXT - 2, va="center",
                )  # fmt: skip
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set(xlabel="microseconds at least")
        _legend(canvas, axes)
        axes.grid(visible=False, axis="y")
    note = (
        f"Bytes that must move by {speed} GB/s of the datasheet; unfused: PyTorch's operators one "
        "by one. A bound that no kernel reaches: these kernels were compiled for the card, not run."
    )
    return Plot("roofline", title, note, out[0])


def _once(axes: Any, label: str) -> str | None:
    """A label for the first of many bars."""
    return None if label in axes.get_legend_handles_labels()[1] else label


def _rows(axes: Any, labels: Sequence[str]) -> None:
    """One row a label, the first at the top."""
    axes.set_yticks(range(len(labels)), map(_short, labels), color=svg.INK)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _short(label: str) -> str:
    """So that something is left for the plot."""
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"


def _from_zero(axes: Any, x: bool = False) -> None:
    axes.set_ylim(bottom=0)
    if x:
        axes.set_xlim(left=0)


def _legend(canvas: Any, axes: Any, columns: int = 0) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = columns or _columns(labels)
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns)
