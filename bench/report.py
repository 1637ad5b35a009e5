"""The report: one HTML file with everything in it, for a desk, a phone and paper.

    python -m stepfuse.bench.report RECORD --out PAGE [--suites FILE] [--static] [--json FILE]

It needs no network and runs no script: plots are SVG in the page, the record is in it whole.
"""

from __future__ import annotations

import argparse
import base64
import html as escaping
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from stepfuse.bench import svg, tables, units
from stepfuse.bench.grids import batches, named, timed
from stepfuse.bench.plots import plots
from stepfuse.bench.record import Candidate, Record, load
from stepfuse.bench.samples import ratios
from stepfuse.bench.style import STYLE
from stepfuse.bench.suite_file import read
from stepfuse.engine.files.writing import check_file, write_file
from stepfuse.kernels.backends import BackendUnavailable

# Nothing is fetched, and nothing runs; data: is for the empty icon.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"

HOW_TO_READ = (
    "Before anything is timed, the images of every candidate are compared with those of the eager "
    "float32 loop from the same x_T. A candidate whose images are wrong has no speed here.",
    "Candidates take turns in one run, with a pause before each, so that whatever else the machine "
    "does meets all of them. Figures are medians; intervals and spreads say how far samples lie "
    "apart.",
    "Ratios are taken pair by pair, between loops that ran one after the other. They hold on other "
    "machines far better than times do.",
    "Latency is the wait for one batch. Throughput is what loops give that run one right after the "
    "other. A larger batch improves the second and worsens the first.",
)
NOT_TO_CONCLUDE = (
    "That a network in bfloat16 does the same as one in float32: compare equal precisions, and see "
    "the PSNR of the images.",
    "That a ratio near 1 is a difference: below 3 % it may be the run, see the spread.",
    "That the p99 is known: with fewer than 100 loops it is close to the slowest of them.",
    "That the times hold for another processor, another number of threads, or a machine that is "
    "busy.",
    "Anything about a GPU from the bounds of the fused ops: they are what memory bandwidth allows, "
    "not measurements.",
    "Anything about how good the model's images are: candidates are compared with each other.",
)


def why_not() -> str:
    """Why no report can be made here, and what to install; empty where one can."""
    return svg.why_not()


def html(record: Record, *, roofline: Sequence[Any] | None = None) -> str:
    """The page. ``roofline`` are rows of `stepfuse.bench.roofline.static_table`, or dicts of them.

    Raises BackendUnavailable where matplotlib, which draws the plots, is not installed.
    """
    rows = [asdict(r) if is_dataclass(r) and not isinstance(r, type) else r for r in roofline or ()]
    if rows:
        record = replace(record, roofline=rows)
    title = _title(record)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{_text(title)} – stepfuse bench</title>\n<link rel="icon" href="data:,">',
        f"<style>\n{STYLE}</style>\n</head>\n<body>",
        f'<header><p class="over">stepfuse bench</p>\n<h1>{_text(title)}</h1>',
        *_introduction(record),
        "</header>\n<main>",
        *_section("In pictures", '<div class="plots">', *_plots(record), "</div>"),
        *_section("In numbers", '<div class="tables">', *_numbers(record), "</div>"),
        *_section("How to read this", _list(HOW_TO_READ)),
        *_section("What not to conclude", _list(NOT_TO_CONCLUDE)),
        *_section("Machine and settings", *_machine(record)),
        *_section("The record", *_raw(record)),
        "</main>\n<footer>Made by stepfuse bench. Every figure of this page is computed from the "
        "samples in the record above.</footer>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def write(
    path: str | os.PathLike[str], record: Record, *, roofline: Sequence[Any] | None = None
) -> None:
    """Write the page, whole or not at all. OSError names ``path``."""
    write_file(path, html(record, roofline=roofline).encode())


def _text(value: object) -> str:
    return escaping.escape(str(value))


def _title(record: Record) -> str:
    s = record.settings
    if s is None:
        return {"suite": "Suites", "roofline": "Fused ops on GPUs, by calculation"}[record.kind]
    return f"{s.model}: {s.steps} {s.method.upper()} steps"


def _section(title: str, *content: str) -> Iterator[str]:
    if any(content):
        yield f"<section>\n<h2>{_text(title)}</h2>"
        yield from content
        yield "</section>"


def _list(sentences: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{_text(s)}</li>" for s in sentences) + "\n</ul>"


def _introduction(record: Record) -> Iterator[str]:
    m = record.machine
    when = f"{m.date[:10]}, commit {m.commit or 'unknown'}"
    where = f"{m.processor}, {units.count(m.threads, 'thread')}" + (
        "" if m.device == "cpu" else f", {m.device}"
    )
    yield f'<p class="lead">{_text(where)}; {_text(when)}.</p>'
    if not record.complete:
        early = "This run was ended early: some figures are missing, or have few samples."
        yield f'<p class="warning">{early}</p>'
    for note in record.notes:
        yield f'<p class="warning">{_text(note)}</p>'
    if figures := list(_headlines(record)):
        yield '<dl class="figures">'
        for name, value, detail in figures:
            small = f"<small>{_text(detail)}</small>"
            yield f"<div><dt>{_text(name)}</dt><dd>{_text(value)}{small}</dd></div>"
        yield "</dl>"


def _headlines(record: Record) -> Iterator[tuple[str, str, str]]:
    """What a reader wants first; ratios only between equal precisions."""
    sizes = batches(record)
    own = [c for c in timed(record) if c.ours]
    if not sizes or not own:
        return
    batch = sizes[0]
    fastest = _fastest(own, batch)
    if fastest is not None:
        yield (
            f"an image, batch {batch}",
            units.seconds(_median(fastest, batch) / batch),
            named(fastest),
        )
    for dtype in ("fp32", "bf16"):
        best = _fastest([c for c in own if c.dtype == dtype], batch)
        peer = _fastest([c for c in timed(record) if not c.ours and c.dtype == dtype], batch)
        if best is not None and peer is not None:
            pairs = ratios(_seconds(peer, batch), _seconds(best, batch))
            value = f"{statistics.median(pairs):.2f}×"
            detail = f"time of {peer.name} by that of {best.name}, batch {batch}"
            yield f"against the fastest peer in {dtype}", value, detail
    rates = [
        (statistics.median(n / s for n, s in zip(w.images, w.seconds, strict=True)), w.batch, c)
        for c in own
        for w in c.throughput
        if w.seconds
    ]
    if rates:
        rate, size, candidate = max(rates, key=lambda found: found[0])
        yield "images a second, at most", units.digits(rate), f"{named(candidate)}, batch {size}"
    checked = [(c, c.verified) for c in own if c.verified and c.dtype == "fp32"]
    if checked:
        worst, verified = max(checked, key=lambda found: found[1].max_abs)
        images = units.count(verified.batch, "image")
        detail = f"{worst.name}, {images} in [-1, 1] against the eager loop"
        yield "largest error of a pixel, fp32", units.small(verified.max_abs), detail


def _seconds(candidate: Candidate, batch: int) -> list[float]:
    runs = candidate.runs(batch)
    return runs.seconds if runs else []


def _median(candidate: Candidate, batch: int) -> float:
    return statistics.median(_seconds(candidate, batch))


def _fastest(candidates: Sequence[Candidate], batch: int) -> Candidate | None:
    found = [c for c in candidates if _seconds(c, batch)]
    return min(found, key=lambda c: _median(c, batch), default=None)


def _plots(record: Record) -> Iterator[str]:
    for plot in plots(record):
        yield plot.html()


def _numbers(record: Record) -> Iterator[str]:
    """The tables; long ones of suites and compiled kernels folded."""
    for name in tables.TABLES:
        found = "\n".join(grid.html() for grid in tables.grids(record, [name]))
        folded = {"suites": "Every case of the suites", "roofline": "Every compiled kernel"}.get(
            name
        )
        if found and name != "summary":
            yield f"<details><summary>{folded}</summary>\n{found}</details>" if folded else found


def _machine(record: Record) -> Iterator[str]:
    yield '<dl class="plain">'
    for part in (record.machine, record.settings):
        for name, value in ({} if part is None else asdict(part)).items():
            if value is None or name == "versions":
                continue
            if name == "memory_bytes":
                name, value = "memory", units.size(value)
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"<dt>{_text(name.replace('_', ' '))}</dt><dd>{_text(shown)}</dd>"
    versions = ", ".join(f"{k} {v}" for k, v in record.machine.versions.items())
    yield f"<dt>versions</dt><dd>{_text(versions)}</dd>"
    yield f"<dt>command</dt><dd><code>{_text(record.command)}</code></dd></dl>"


def _raw(record: Record) -> Iterator[str]:
    text = json.dumps(asdict(record), allow_nan=False)
    data = base64.b64encode(json.dumps(asdict(record), indent=1, allow_nan=False).encode()).decode()
    yield "<p>Every sample, as JSON: what <code>stepfuse bench --compare</code> reads.</p>"
    yield (
        f'<p><a download="record.json" href="data:application/json;base64,{data}">Save '
        f"record.json</a> ({units.size(len(data) * 3 / 4)})</p>"
    )
    inert = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    yield f'<script type="application/json" id="record">{inert}</script>'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the result is the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stepfuse.bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the page")
    parser.add_argument("--suites", type=Path, help="file of the suites, to stand beside the loops")
    parser.add_argument("--static", action="store_true", help="add the fused ops compiled for GPUs")
    parser.add_argument("--json", type=Path, help="write the record with all that was added")
    options = parser.parse_args(arguments)
    try:
        if reason := why_not():
            raise BackendUnavailable(reason)
        for path in filter(None, (options.out, options.json)):
            check_file(path)
        record = load(options.record)
        if options.suites:
            record.suite = read(options.suites)
        if options.static:
            from stepfuse.bench.roofline import static_table

            record.roofline = [asdict(row) for row in static_table()]
        if options.json:
            record.save(options.json)
        write(options.out, record)
    except (OSError, ValueError, ImportError, BackendUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
