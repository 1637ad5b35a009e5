"""Whatever a run that was ended early left behind can be shown and compared."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console
from tests.bench.example_record import example, example_roofline, example_suite

from stepfuse.bench import report, svg, tables
from stepfuse.bench.compare import compare
from stepfuse.bench.record import Energy, Record, Runs, Windows


def torn(seed: int) -> Record:
    """An example from which samples, figures and candidates are missing at random."""
    draw = random.Random(seed)
    record = example(seed=seed)
    record.suite = example_suite().suite[: draw.randint(0, 6)]
    record.roofline = example_roofline().roofline[: draw.randint(0, 4)]
    record.complete = False
    for c in record.candidates:
        figures: list[list[Runs] | list[Windows]] = [c.latency, c.over_steps, c.throughput]
        for runs in figures:
            del runs[draw.randint(0, 4) :]
            for entry in runs:
                left = draw.choice([0, 1, 2, 12])
                del entry.seconds[left:]
                if isinstance(entry, Windows):
                    del entry.images[left:]
                if draw.random() < 0.1:  # a laptop that slept
                    entry.seconds[:1] = [1e5 * s for s in entry.seconds[:1]]
        if c.cold_start is not None:
            for samples in (c.cold_start.import_seconds, c.cold_start.build_seconds,
                            c.cold_start.first_seconds, c.cold_start.peak_bytes,
                            c.cold_start.imported_bytes):  # fmt: skip
                del samples[draw.randint(0, 6) :]
        if c.split is not None:
            for samples in (c.split.network, c.split.update, c.split.rest):
                del samples[draw.randint(0, 6) :]
        for name in ("cold_start", "split", "energy"):
            if draw.random() < 0.2:
                setattr(c, name, None)
        if draw.random() < 0.1:
            c.energy = Energy("a counter that stood still", 1, [0.0, 0.0])
    draw.shuffle(record.candidates)
    del record.candidates[draw.randint(0, 8) :]
    record.check()
    return record


@pytest.mark.parametrize("seed", range(12))
def test_it_is_printed_and_compared(seed: int) -> None:
    record = torn(seed)
    console = Console(file=io.StringIO(), width=40 + 10 * seed)
    tables.print_tables(record, console)
    assert "ended early" in tables.markdown(record)
    tables.markdown(record, ["summary"])
    for comparison in (compare(record, example()), compare(example(), record)):
        assert any("ended early" in warning for warning in comparison.warnings)
        console.print(comparison.table())
        assert all(row.candidate in comparison.markdown() for row in comparison.rows if row.changed)


@pytest.mark.skipif(bool(svg.why_not()), reason=svg.why_not() or "matplotlib is there")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.filterwarnings("error")
def test_it_is_drawn(seed: int) -> None:
    assert report.html(torn(seed)).endswith("</html>\n")
