"""What is in a record of whole loops, table by table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from stepfuse.bench import units
from stepfuse.bench.grid import Grid
from stepfuse.bench.record import Candidate, ColdStart, Record, Runs, Windows
from stepfuse.bench.samples import Summary, percentile, ratios

NO_FIGURE = "–"


def timed(record: Record) -> list[Candidate]:
    """The candidates that have a time."""
    return [c for c in record.candidates if c.latency or c.throughput or c.over_steps]


def batches(record: Record) -> list[int]:
    """Batch sizes at which some candidate was timed."""
    return sorted({runs.batch for c in record.candidates for runs in c.latency if runs.seconds})


def named(candidate: Candidate) -> str:
    """With its precision."""
    name, dtype = candidate.name, candidate.dtype
    return name if name.endswith(dtype) else f"{name} ({dtype})"


def summary(record: Record) -> Iterator[Grid]:
    """One line a candidate: what a reader wants first."""
    sizes, last = batches(record), ("cold start", "peak memory", "PSNR")
    grid = Grid(
        "Medians of one alternating run",
        ["<candidate", *(f"ms an image, batch {b}" for b in sizes), "images/s, most", *last],
        caption="Cold start: from a new interpreter to the first images, with imports and "
        "compilation. PSNR: of the images to those of the eager float32 loop.",
    )
    for c in timed(record):
        found = {r.batch: statistics.median(r.seconds) / r.batch for r in c.latency if r.seconds}
        rates = [statistics.median(_rates(w)) for w in c.throughput if w.seconds]
        cold = c.cold_start
        totals = _totals(cold) if cold else []
        peak = statistics.median(cold.peak_bytes) if cold and cold.peak_bytes else None
        grid.add(
            [
                named(c),
                *(units.digits(found[b] * 1e3) if b in found else NO_FIGURE for b in sizes),
                units.digits(max(rates)) if rates else NO_FIGURE,
                units.seconds(statistics.median(totals)) if totals else NO_FIGURE,
                units.size(peak) if peak else NO_FIGURE,
                _psnr(c),
            ],
            c.ours,
        )
    yield grid


def verification(record: Record) -> Iterator[Grid]:
    """How close the images are to the reference's."""
    grid = Grid(
        "Verified before timing: images against the eager float32 loop, from the same x_T",
        ["<candidate", "images", "largest difference", "PSNR", "<asked for", "<"],
        caption="Differences are of pixels in [-1, 1], PSNR in dB for a range of 2.",
    )
    for c in record.candidates:
        v = c.verified
        if v is not None:
            found = [str(v.batch), units.small(v.max_abs), _psnr(c)]
            verdict = "passed" if v.passed else "failed: not timed"
            grid.add([named(c), *found, v.limit, verdict], c.ours)
    yield grid


def _psnr(candidate: Candidate) -> str:
    v = candidate.verified
    if v is None:
        return NO_FIGURE
    return "identical" if v.psnr is None else f"{v.psnr:.1f} dB"


def latency(record: Record) -> Iterator[Grid]:
    """A table for each batch size."""
    for batch in batches(record):
        entries = [(c, r) for c in timed(record) if (r := c.runs(batch)) and r.seconds]
        counts = sorted({len(r.seconds) for _, r in entries})
        samples = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lengths = sorted({r.steps for _, r in entries})
        grid = Grid(
            f"Latency, batch {batch}, {' or '.join(map(str, lengths))} steps",
            ["<candidate", "an image: p50", "p95", "p99", "a step: p50", "p95", "p99", "spread"],
            caption=f"{samples} loops each, taken in turn; of fewer than 100 the p99 is close to "
            "the largest. An image: the loop by its batch. Spread: median absolute deviation.",
        )
        for c, r in entries:
            s = Summary.of(r.seconds)
            values = [x / by for by in (r.batch, r.steps) for x in (s.median, s.p95, s.p99)]
            grid.add([named(c), *map(units.seconds, values), f"{s.mad / s.median:.1%}"], c.ours)
        yield grid


def peers(record: Record) -> Iterator[Grid]:
    """Every peer against every candidate of ours, pair by pair."""
    own = [c for c in timed(record) if c.ours]
    others = [c for c in timed(record) if not c.ours]
    grid = Grid(
        "How many times longer a peer takes than ours, pair by pair",
        ["<peer", "batch", *(named(c) for c in own)],
        caption="Median of the ratios of loops that ran one after the other, in brackets the "
        "quarter and three quarters of them. Above 1 ours is faster.",
    )
    if len({c.dtype for c in (*own, *others)}) > 1:
        grid.caption += " One in fp32 beside one in bf16 does not do the same arithmetic."
    for batch in batches(record) if own else ():
        for peer in others:
            theirs = peer.runs(batch)
            if theirs is not None and theirs.seconds:
                grid.add([named(peer), str(batch), *(_pairs(theirs, c.runs(batch)) for c in own)])
    yield grid


def _pairs(theirs: Runs, ours: Runs | None) -> str:
    found = ratios(theirs.seconds, ours.seconds) if ours and ours.steps == theirs.steps else []
    if not found:
        return NO_FIGURE
    low, middle, high = (percentile(found, p) for p in (25, 50, 75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def throughput(record: Record) -> Iterator[Grid]:
    """Images a second over batch sizes."""
    sizes = sorted({w.batch for c in record.candidates for w in c.throughput})
    grid = Grid(
        "Throughput: images a second",
        ["<candidate", *(f"batch {b}" for b in sizes)],
        caption="Loops one right after the other; median of the windows, ± median absolute "
        "deviation.",
    )
    for c in timed(record):
        found = {w.batch: w for w in c.throughput if w.seconds}
        if found:
            cells = [_rate(found[b]) if b in found else NO_FIGURE for b in sizes]
            grid.add([named(c), *cells], c.ours)
    yield grid


def _rates(windows: Windows) -> list[float]:
    return [n / s for n, s in zip(windows.images, windows.seconds, strict=True)]


def _rate(windows: Windows) -> str:
    s = Summary.of(_rates(windows))
    return f"{units.digits(s.median)} ± {s.mad / s.median:.1%}"


def steps(record: Record) -> Iterator[Grid]:
    """The loop over its number of steps."""
    counts = sorted({runs.steps for c in record.candidates for runs in over_steps(record, c)})
    if len(counts) < 2 or record.settings is None:
        return
    grid = Grid(
        f"The whole loop over its steps, batch {record.settings.batches[0]}",
        ["<candidate", *(f"{n} steps" for n in counts)],
        caption="Medians.",
    )
    for c in timed(record):
        found = {r.steps: statistics.median(r.seconds) for r in over_steps(record, c)}
        cells = [units.seconds(found[n]) if n in found else NO_FIGURE for n in counts]
        grid.add([named(c), *cells], c.ours)
    yield grid


def over_steps(record: Record, candidate: Candidate) -> list[Runs]:
    """Loops at the first batch size, by their number of steps; the usual number among them."""
    if record.settings is None:
        return []
    usual = candidate.runs(record.settings.batches[0])
    found = [*candidate.over_steps, *([usual] if usual else [])]
    return sorted((r for r in found if r.seconds), key=lambda r: r.steps)


def split(record: Record) -> Iterator[Grid]:
    """Network, update and rest."""
    grid = Grid("Where a step's time goes", ["<candidate", "batch", "network", "update", "rest"])
    how: dict[str, str] = {}
    for c in record.candidates:
        if (s := c.split) and s.network and s.update and s.rest:
            parts = [statistics.median(part) for part in (s.network, s.update, s.rest)]
            shares = [f"{units.seconds(part)} ({part / sum(parts):.1%})" for part in parts]
            grid.add([named(c), str(s.batch), *shares], c.ours)
            how[s.how] = f"{how[s.how]}, {c.name}" if s.how in how else c.name
    grid.caption = "; ".join(
        f"{names}: {ways}" if len(how) > 1 else ways for ways, names in how.items()
    )
    yield grid


def cold(record: Record) -> Iterator[Grid]:
    """Cold start and peak memory."""
    memory = ("peak memory", "without imports")
    grid = Grid(
        "Cold start, each in a new process, and the memory that it came to hold",
        ["<candidate", "batch", "imports", "build", "first loop", "together", *memory],
        caption="Medians over the processes. Peak memory is of the whole process.",
    )
    for c in record.candidates:
        s = c.cold_start
        if s is None or not _totals(s):
            continue
        parts = [statistics.median(x) for x in (s.import_seconds, s.build_seconds, s.first_seconds)]
        own = [peak - base for peak, base in zip(s.peak_bytes, s.imported_bytes, strict=False)]
        held = [units.size(statistics.median(x)) if x else NO_FIGURE for x in (s.peak_bytes, own)]
        together = units.seconds(statistics.median(_totals(s)))
        grid.add([named(c), str(s.batch), *map(units.seconds, parts), together, *held], c.ours)
    yield grid


def _totals(cold: ColdStart) -> list[float]:
    parts = zip(cold.import_seconds, cold.build_seconds, cold.first_seconds, strict=False)
    return [sum(part) for part in parts]


def energy(record: Record) -> Iterator[Grid]:
    """Joules an image, or why there are none."""
    grid = Grid(
        "Energy of an image, the idle machine included",
        ["<candidate", "batch", "joules", "spread", "<counter, or why there is no figure"],
    )
    tried = [(c, c.energy) for c in record.candidates if c.energy is not None]
    reasons = {e.reason for _, e in tried if not e.joules_per_image}
    if len(reasons) == 1 and not any(e.joules_per_image for _, e in tried):
        grid.add(["every candidate", NO_FIGURE, NO_FIGURE, NO_FIGURE, *reasons])
        tried = []
    for c, e in tried:
        if not e.joules_per_image:
            grid.add([named(c), NO_FIGURE, NO_FIGURE, NO_FIGURE, e.reason], c.ours)
            continue
        s = Summary.of(e.joules_per_image)
        spread = f"{s.mad / s.median:.1%}" if s.median else NO_FIGURE
        grid.add([named(c), str(e.batch), units.digits(s.median), spread, e.source], c.ours)
    yield grid


def left_out(record: Record) -> Iterator[Grid]:
    """Who was not timed, and why."""
    grid = Grid("Left out", ["<candidate", "<at", "<why"])
    for c in record.candidates:
        if c.failure:
            grid.add([named(c), c.failed_at, c.failure], c.ours)
    yield grid
