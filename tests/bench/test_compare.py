"""Two records side by side: what changed beyond the spread, and why it may not be the program."""

from __future__ import annotations

import io
import statistics

import pytest
from rich.console import Console
from tests.bench.example_record import example, example_roofline, example_suite

from stepfuse.bench.compare import Comparison, Row, compare
from stepfuse.bench.record import Record


def pair(faster: float = 1.0) -> tuple[Record, Record]:
    """Two runs with scatter of their own; ours takes 1/``faster`` of its time in the second."""
    return example(), example(faster, seed=5)


def row(comparison: Comparison, candidate: str, figure: str, where: str = "batch 1") -> Row:
    (found,) = (
        r for r in comparison.rows if (r.candidate, r.figure, r.where) == (candidate, figure, where)
    )
    return found


def text(comparison: Comparison, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_ours_became_faster_and_the_peers_did_not() -> None:
    a, b = pair(faster=1.5)
    found = compare(a, b)
    for name in ("stepfuse", "stepfuse-eager", "stepfuse-bf16"):
        for figure in ("latency", "back to back", "energy"):
            assert row(found, name, figure).change.verdict == "faster"
        for batch in (8, 32):
            assert row(found, name, "latency", f"batch {batch}").verdict == "faster"
        assert row(found, name, "latency, 25 steps").verdict == "faster"
        assert row(found, name, "energy").verdict == "less"
        assert row(found, name, "peak memory").verdict == "within the spread"
    peers = [r for r in found.rows if not r.ours]
    assert len(peers) == 32  # the 11 figures of each of three, less OpenVINO's energy
    assert not any(r.changed for r in peers)
    assert found.warnings == []


def test_the_change_is_the_ratio_of_medians() -> None:
    a, b = pair(faster=1.5)
    found = row(compare(a, b), "stepfuse", "latency", "batch 8").change
    old, new = (r.candidate("stepfuse").runs(8) for r in (a, b))
    assert old is not None
    assert new is not None
    exact = statistics.median(new.seconds) / statistics.median(old.seconds)
    assert found.value == pytest.approx(exact, rel=1e-12)
    assert found.low < exact < found.high
    assert found.low == pytest.approx(1 / 1.5, rel=0.1)  # samples scatter by 4 %


def test_the_same_program_twice_has_not_changed() -> None:
    found = compare(*pair())
    assert not any(r.changed for r in found.rows)
    assert "0 faster or less, 0 slower or more, 65 within" in text(found)


def test_slower_the_other_way_round() -> None:
    a, b = pair(faster=1.5)
    assert row(compare(b, a), "stepfuse", "latency").verdict == "slower"
    assert row(compare(b, a), "stepfuse", "energy").verdict == "more"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("threads", 4, "threads is 2 in a, 4 in b"),
        ("processor", "Another", "processor is Example CPU <9000> & friends in a, Another in b"),
        ("isa", "avx2", "isa is avx512 in a, avx2 in b"),
        ("load", 3.5, "b was taken on a busy machine: load 3.5"),
        ("versions", {"torch": "2.14"}, "torch is 2.13.0 in a, 2.14 in b"),
        ("versions", {"torch": "2.13.0"}, "diffusers is 0.35.0 in a, not there in b"),
    ],
)
def test_another_machine_is_said(name: str, value: object, said: str) -> None:
    a, b = pair()
    setattr(b.machine, name, value)
    warnings = compare(a, b).warnings
    assert any(said in warning for warning in warnings), warnings
    assert f"warning: {warnings[0]}" in " ".join(text(compare(a, b), width=400).split())


def test_another_commit_is_no_warning_but_said() -> None:
    a, b = pair()
    b.machine.commit = "fedcba987654"
    b.machine.versions["stepfuse"] = "0.2.0"
    found = compare(a, b)
    assert found.warnings == []
    assert "commit 0123456789ab" in found.markdown()
    assert "commit fedcba987654" in found.markdown()


def test_another_task_is_said_and_its_steps_are_not_mixed() -> None:
    a, b = pair()
    assert b.settings is not None
    b.settings.steps, b.settings.eta = 20, 1.0
    for c in b.candidates:
        for runs in (*c.latency, *c.throughput):
            runs.steps = 20
    found = compare(a, b)
    assert "the settings differ: steps is 50 in a, 20 in b" in found.warnings
    assert "the settings differ: eta is 0.0 in a, 1.0 in b" in found.warnings
    assert {r.figure for r in found.rows} == {
        "latency, 13 steps", "latency, 25 steps", "cold start", "peak memory", "energy"
    }  # fmt: skip
    assert "stepfuse latency, 50 steps batch 8" in found.not_in_both
    assert "stepfuse latency, 20 steps batch 8" in found.not_in_both


def test_a_slower_machine_is_seen_in_the_peers() -> None:
    a, b = pair()
    for c in b.candidates:
        for runs in c.latency:
            runs.seconds = [1.3 * s for s in runs.seconds]
    (warning,) = compare(a, b).warnings
    assert "the peers' latency changed too" in warning
    assert "judge ours by its ratio" in warning


def test_candidates_of_one_record_only_are_listed_with_the_reason() -> None:
    a, b = pair()
    b.candidates = [c for c in b.candidates if c.name not in ("compile", "openvino")]
    b.candidates.append(a.candidate("openvino-bf16"))
    b.candidates[-1].name = "openvino"
    a.candidates = [c for c in a.candidates if c.name != "stepfuse-eager"]
    found = compare(a, b)
    assert found.only_a == [
        "compile",
        "openvino (the other: its images are at 9.1 dB of the reference's: not timed)",
    ]
    assert found.only_b == ["stepfuse-eager"]
    assert "only in a: compile, openvino" in text(found)
    assert "only in b: stepfuse-eager" in found.markdown()
    assert not any(r.candidate in ("compile", "stepfuse-eager") for r in found.rows)


def test_suites_are_compared_by_their_ratios() -> None:
    a, b = example_suite(), example_suite()
    for timing in b.suite:  # a machine that is slower in everything, and ours in one case
        factor = 9.0 if timing.name == "stepfuse" and "8x64" in timing.group else 3.0
        timing.seconds = [factor * s for s in timing.seconds]
    found = {r.candidate: r.verdict for r in compare(a, b).rows}
    assert found["kernels: group_norm_silu 8x64x32x32: stepfuse"] == "slower"
    assert found["kernels: group_norm_silu 1x64x32x32: stepfuse"] == "within the spread"
    assert found["kernels: group_norm_silu 8x64x32x32: eager"] == "within the spread"


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="'sampler' and 'suite'"):
        compare(example(), example_suite())
    with pytest.raises(ValueError, match="'roofline' and 'roofline'"):
        compare(example_roofline(), example_roofline())


def test_nothing_in_common_is_said() -> None:
    a, b = pair()
    b.candidates.clear()
    found = compare(a, b)
    assert found.rows == []
    assert "0 figures in both" in text(found)
    assert "only in a: stepfuse" in found.markdown()


def test_markup_of_the_terminal_is_not_taken_from_a_file() -> None:
    a, b = pair()
    a.machine.processor = "[red]CPU[/red]"
    assert "[red]CPU[/red]" in text(compare(a, b))
