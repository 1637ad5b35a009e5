"""Tables: what they say is what the samples say, and documents are filled from records."""

from __future__ import annotations

import io
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tests.bench.example_record import example, example_roofline, example_suite

from stepfuse.bench import tables, units
from stepfuse.bench.grid import Grid
from stepfuse.bench.record import Energy, Record

ROOT = Path(__file__).parents[2]


def shown(record: Record, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    tables.print_tables(record, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def grid(record: Record, name: str, number: int = 0) -> Grid:
    return list(tables.grids(record, [name]))[number]


def row(found: Grid, start: str) -> list[str]:
    (cells,) = (cells for cells in found.rows if cells[0] == start)
    return cells


def value(cell: str) -> float:
    """Of a figure with a unit, in seconds, bytes or as it is."""
    number, _, unit = cell.partition(" ")
    return float(number) * {"ms": 1e-3, "us": 1e-6, "MiB": 2.0**20, "GiB": 2.0**30}.get(unit, 1)


THREE_DIGITS = 6e-3  # relative


def test_latency_is_the_percentiles_of_the_samples() -> None:
    record = example()
    for number, batch in enumerate((1, 8, 32)):
        cells = row(grid(record, "latency", number), "diffusers (fp32)")
        runs = record.candidate("diffusers").runs(batch)
        assert runs is not None
        exact = [np.percentile(runs.seconds, p) / n for n in (batch, 50) for p in (50, 95, 99)]
        assert [value(cell) for cell in cells[1:7]] == pytest.approx(exact, rel=THREE_DIGITS)


def test_ratios_are_taken_pair_by_pair() -> None:
    record = example()
    found = grid(record, "ratios")
    assert found.columns[2:] == ["stepfuse (fp32)", "stepfuse-eager (fp32)", "stepfuse-bf16"]
    assert [cells[:2] for cells in found.rows[:3]] == [
        ["diffusers (fp32)", "1"], ["compile (fp32)", "1"], ["openvino (fp32)", "1"]
    ]  # fmt: skip
    theirs, ours = (record.candidate(n).runs(1) for n in ("compile", "stepfuse-bf16"))
    assert theirs is not None
    assert ours is not None
    pairs = np.asarray(theirs.seconds) / np.asarray(ours.seconds)
    quarter, median, last = np.percentile(pairs, [25, 50, 75])
    assert found.rows[1][4] == f"{median:.2f} ({quarter:.2f} to {last:.2f})"


def test_ratios_of_an_interrupted_run_use_whole_rounds() -> None:
    record = example()
    ours = record.candidate("stepfuse").runs(1)
    assert ours is not None
    del ours.seconds[7:]
    assert value(grid(record, "ratios").rows[0][2].split()[0]) > 1
    ours.seconds.clear()
    assert grid(record, "ratios").rows[0][2] == "–"


def test_throughput_is_images_a_second() -> None:
    record = example()
    cells = row(grid(record, "throughput"), "stepfuse (fp32)")
    windows = record.candidate("stepfuse").throughput[1]
    rate = np.median(np.asarray(windows.images) / np.asarray(windows.seconds))
    assert value(cells[2]) == pytest.approx(rate, rel=THREE_DIGITS)


def test_cold_start_adds_its_parts_process_by_process() -> None:
    record = example()
    cells = row(grid(record, "cold"), "openvino (fp32)")
    cold = record.candidate("openvino").cold_start
    assert cold is not None
    parts = np.array([cold.import_seconds, cold.build_seconds, cold.first_seconds])
    exact = [*np.median(parts, axis=1), np.median(parts.sum(axis=0))]
    assert [value(cell) for cell in cells[2:6]] == pytest.approx(exact, rel=THREE_DIGITS)
    memory = [statistics.median(cold.peak_bytes), 300 << 20]
    assert [value(cell) for cell in cells[6:]] == pytest.approx(memory, rel=THREE_DIGITS)


def test_the_parts_of_a_step_add_up_to_all_of_it() -> None:
    cells = row(grid(example(), "split"), "stepfuse (fp32)")
    shares = [float(share) for cell in cells[2:] for share in re.findall(r"\((.*)%\)", cell)]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert shares[0] == pytest.approx(93, abs=1)


def test_energy_says_why_there_is_none() -> None:
    record = example()
    assert "no counter" in row(grid(record, "energy"), "openvino (fp32)")[-1]
    for candidate in record.candidates:
        candidate.energy = Energy(reason="nothing counts here")
    assert grid(record, "energy").rows == [
        ["every candidate", "–", "–", "–", "nothing counts here"]
    ]


def test_who_is_wrong_is_shown_without_a_speed() -> None:
    record = example()
    assert row(grid(record, "verification"), "openvino-bf16")[-1] == "failed: not timed"
    assert row(grid(record, "verification"), "stepfuse-eager (fp32)")[3] == "identical"
    assert row(grid(record, "left-out"), "openvino-bf16")[1] == "verify"
    for name in ("summary", "latency", "throughput", "ratios", "cold", "split"):
        for found in tables.grids(record, [name]):
            assert not any(cells[0].startswith("openvino-bf16") for cells in found.rows)


def test_everything_is_printed_and_the_machine_named() -> None:
    record = example()
    record.complete = False
    text = shown(record)
    for said in ("Example CPU <9000> & friends", "2 threads on 2 cores", "commit 0123456789ab",
                 "torch 2.13.0", "digits: 1.9 M parameters", "An invented record.",
                 "ended early", "Left out", "pip install onnxruntime"):  # fmt: skip
        assert said in text, said
    assert "Latency, batch 32, 50 steps" in text
    assert shown(record, width=60)  # a narrow terminal
    assert "group_norm_silu 8x64x32x32" in shown(example_suite())
    assert "H100 SXM (sm_90): never run" in shown(example_roofline())


def test_a_record_with_nothing_in_it_prints() -> None:
    record = example()
    record.candidates.clear()
    assert "Example CPU" in shown(record)
    assert tables.markdown(record)


def test_suites_are_ratios_to_their_reference() -> None:
    record = example_suite()
    found = grid(record, "suites")
    own, copy = record.suite[0], record.suite[2]
    ratio = np.median(np.asarray(own.seconds) / np.asarray(copy.seconds))
    assert found.rows[0][4] == f"{ratio:.2f}"
    assert found.rows[2][4] == "1.00"


def test_markdown_has_as_many_cells_as_headings() -> None:
    record = example()
    record.candidates[3].failure = "a | b\nand <c>"
    text = tables.markdown(record)
    lines = [re.sub(r"\\\|", "", line) for line in text.splitlines()]
    block: list[int] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            block.append(line.count("|"))
        else:
            assert len(set(block)) <= 1, block
            block = []
    assert r"a \| b and &lt;c>" in text


@pytest.mark.parametrize("wrong", ["speed", "Latency"])
def test_a_table_that_there_is_not_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"no table is named '{wrong}'; accepted: summary"):
        tables.markdown(example(), [wrong])


def test_a_document_is_filled_from_its_files(tmp_path: Path) -> None:
    example().save(tmp_path / "kept.json")
    document = tmp_path / "README.md"
    before = (
        "# Before\n<!-- from: kept.json summary ratios -->\nstale figures\n<!-- end -->\nbetween\n"
        "<!-- from: kept.json left-out -->\n<!-- end -->\nafter\n"
    )
    document.write_text(before)
    assert tables.main(["--write", str(document)]) == 0
    once = document.read_text()
    assert once.count("Medians of one alternating run") == 1
    assert once.count("**Left out**") == 1
    assert "stale" not in once
    assert [once.startswith("# Before\n"), "\nbetween\n" in once, once.endswith("\nafter\n")] == [
        True
    ] * 3
    assert tables.main(["--write", str(document)]) == 0
    assert document.read_text() == once  # the second time changes nothing
    example(faster=2).save(tmp_path / "kept.json")
    assert tables.filled(once, tmp_path) != once  # a figure that no longer comes from the file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- from: kept.json -->\nno end\n", "no '<!-- end -->'"),
        ("<!-- from: kept.json speed -->\n<!-- end -->\n", "no table is named"),
        ("<!-- from: gone.json -->\n12 ms\n<!-- end -->\n", "gone.json"),
    ],
)
def test_a_document_that_cannot_be_filled_stays(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example().save(tmp_path / "kept.json")
    document = tmp_path / "README.md"
    document.write_text(text)
    assert tables.main(["--write", str(document)]) == 2
    assert said in capsys.readouterr().err
    assert document.read_text() == text


def test_a_place_without_figures_may_wait_for_its_file(tmp_path: Path) -> None:
    text = "<!-- from: kept.json summary -->\n<!-- end -->\n"
    assert tables.filled(text, tmp_path) == text
    example().save(tmp_path / "kept.json")
    assert "Medians of one alternating run" in tables.filled(text, tmp_path)


def test_the_command_prints_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kept.json"
    example().save(path)
    assert tables.main([str(path), "--only", "summary"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"<!-- from: {path} summary -->\n")
    assert tables.filled(out, tmp_path) == out
    assert tables.main([str(tmp_path / "gone.json")]) == 2


@pytest.mark.parametrize(
    "document", sorted(p.relative_to(ROOT) for p in [ROOT / "README.md", *ROOT.glob("bench/*.md")])
)
def test_every_figure_of_a_document_comes_from_a_kept_file(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert tables.filled(text, (ROOT / document).parent) == text, (
        f"run python -m stepfuse.bench.tables --write {document}"
    )


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (units.seconds(0.0123456), "12.3 ms"),
        (units.seconds(0.99996), "1.00 s"),
        (units.seconds(0.0009999), "1.00 ms"),
        (units.seconds(1234.4), "1234 s"),
        (units.seconds(2.5e-9), "2.50 ns"),
        (units.seconds(0), "0 ns"),
        (units.size(612 << 20), "612 MiB"),
        (units.size(0), "0 B"),
        (units.digits(9.996), "10.0"),
        (units.digits(float("nan")), "nan"),
        (units.small(0.0), "0"),
        (units.small(2.14e-5), "2.1e-05"),
    ],
)
def test_units(given: str, written: str) -> None:
    assert given == written


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        Grid("two", ["<a", "b"]).add(["1"])
