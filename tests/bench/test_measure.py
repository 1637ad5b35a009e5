"""A run: who is timed, in which order, how often, and what is left after a fault or Ctrl-C."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.bench.hasty import Silent, launched
from torch import Tensor

from stepfuse.bench import measure
from stepfuse.bench.candidates import Entry, entry
from stepfuse.bench.energy import Counter, NoCounter
from stepfuse.bench.measure import Bench, Budget, Plan, other_steps
from stepfuse.bench.processes import ProcessFailed
from stepfuse.bench.record import Verified, load
from stepfuse.bench.timing import LEAST_ROUNDS
from stepfuse.bench.workload import Spec, Workload

ROUNDS = 4


class Changed:
    """A loop with other images."""

    def __init__(self, loop: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.loop, self.change, self.draws = loop, change, loop.draws

    def prepare(self, steps: int) -> None:
        self.loop.prepare(steps)

    def wake(self) -> None:
        self.loop.wake()

    def images(self) -> Tensor:
        return self.change(self.loop.images())


def wrong_at(batch: int) -> Entry:
    """A candidate whose images are wrong at one batch size."""
    eager = entry("stepfuse-eager")

    def build(workload: Workload, size: int) -> Any:
        loop = eager.build(workload, size)
        return Changed(loop, lambda x: x + 0.1) if size == batch else loop

    return replace(eager, name="wrong", build=build)


def broken_at(batch: int) -> Entry:
    """A candidate that cannot be built for one batch size."""
    eager = entry("stepfuse-eager")

    def build(workload: Workload, size: int) -> Any:
        if size == batch:
            raise RuntimeError("\n  no kernel for this shape\nand a long trace")
        return eager.build(workload, size)

    return replace(eager, name="broken", build=build)


def bench(tiny: str, entries: list[Entry], watch: Any = None, **settings: Any) -> Bench:
    workload = Workload(Spec(tiny, steps=4, optimize=False))
    plan = Plan(**{"batches": (1, 3), "rounds": ROUNDS, "processes": 2, **settings})
    return Bench(workload, entries, plan, watch or Silent(), launch=launched)


pytestmark = pytest.mark.usefixtures("hasty")
OURS = [entry("stepfuse"), entry("stepfuse-eager")]


def test_a_run_measures_everything(tiny: str, tmp_path: Path) -> None:
    run = bench(tiny, OURS)
    record = run.run()
    record.save(tmp_path / "record.json")
    assert load(tmp_path / "record.json") == record
    assert record.complete
    assert record.settings is not None
    assert record.settings.condition == "labels 0 .. 2 taking turns"
    assert record.settings.backend in ("cpp", "reference")
    assert [c.name for c in record.candidates] == ["stepfuse", "stepfuse-eager"]
    for c in record.candidates:
        assert c.failure == ""
        assert c.verified is not None
        assert c.verified.passed
        assert [(r.batch, r.steps, len(r.seconds)) for r in c.latency] == [
            (1, 4, ROUNDS),
            (3, 4, ROUNDS),
        ]
        assert [(r.batch, r.steps, len(r.seconds)) for r in c.over_steps] == [
            (1, 1, ROUNDS),
            (1, 2, ROUNDS),
        ]
        assert [(w.batch, len(w.seconds), len(w.images)) for w in c.throughput] == [
            (1, ROUNDS, ROUNDS),
            (3, ROUNDS, ROUNDS),
        ]
        assert all(n % w.batch == 0 for w in c.throughput for n in w.images)
        assert c.cold_start is not None
        assert c.cold_start.import_seconds == [1.0, 1.0]
        assert c.split is not None
        for part in (c.split.network, c.split.update, c.split.rest):
            assert len(part) == 3
            assert min(part) >= 0
        assert min(c.split.network) > 0
        assert min(c.split.update) > 0
    assert "captured" in record.candidate("stepfuse").split.how
    assert "step by step" in record.candidate("stepfuse-eager").split.how


def test_the_record_is_saved_again_and_again(tiny: str) -> None:
    saved: list[int] = []
    run = bench(tiny, OURS[:1], batches=(1,))
    run.save = lambda record: saved.append(
        sum(len(r.seconds) for r in record.candidates[0].latency)
    )
    run.run()
    assert len(saved) >= 5
    assert saved == sorted(saved)
    assert saved[0] == ROUNDS


@pytest.mark.parametrize("batch", [1, 3])
def test_a_wrong_candidate_has_an_error_and_no_speed(batch: int, tiny: str) -> None:
    """Wrong at one batch size is wrong, also where it was timed at another before."""
    watch = Silent()
    record = bench(tiny, [*OURS, wrong_at(batch)], watch).run()
    wrong = record.candidate("wrong")
    assert wrong.failed_at == "verify"
    assert "differ from the eager float32 loop's by 0.1" in wrong.failure
    assert wrong.verified is not None
    assert not wrong.verified.passed
    assert wrong.verified.max_abs == pytest.approx(0.1, abs=1e-3)
    assert (wrong.latency, wrong.over_steps, wrong.throughput) == ([], [], [])
    assert (wrong.cold_start, wrong.energy, wrong.split) == (None, None, None)
    assert any(text.startswith("wrong is left out") for text in watch.said)
    assert len(record.candidate("stepfuse").latency) == 2
    record.check()


def test_a_candidate_that_cannot_be_built_is_left_out(tiny: str) -> None:
    record = bench(tiny, [*OURS[:1], broken_at(1)]).run()
    broken = record.candidate("broken")
    assert (broken.failed_at, broken.failure) == (
        "build",
        "RuntimeError: no kernel for this shape",
    )
    assert broken.latency == []
    assert record.complete


def test_figures_before_a_later_failure_are_kept(tiny: str) -> None:
    record = bench(tiny, [*OURS[:1], broken_at(3)]).run()
    broken = record.candidate("broken")
    assert broken.failure == ""
    assert [r.batch for r in broken.latency] == [1]
    assert any("could not be built for batch 3" in note for note in record.notes)


def test_what_is_not_installed_is_named_and_the_rest_runs(tiny: str) -> None:
    absent = replace(entry("openvino"), needs=("no_such_runtime",))
    watch = Silent()
    record = bench(tiny, [*OURS[:1], absent], watch, batches=(1,)).run()
    assert record.candidate("openvino").failed_at == "install"
    assert "pip install no_such_runtime" in watch.said[0]
    assert record.candidate("stepfuse").latency


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("at", "kept"),
    [
        ("batch 1: building", 0),
        ("one loop at a time", 0),
        ("loops one after the other", 1),
        ("timing with 2 of", 1),
        ("batch 3: verifying", 1),
        ("cold start", 2),
    ],
)
def test_ctrl_c_keeps_what_was_measured(at: str, kept: int, tiny: str, tmp_path: Path) -> None:
    run = bench(tiny, OURS, Silent(at, interrupt))
    run.save = lambda record: record.save(tmp_path / "record.json")
    record = run.run()
    assert not record.complete
    assert "Interrupted" in record.notes[-1]
    for c in record.candidates:
        assert len(c.latency) == kept
        assert all(f.seconds for f in (*c.latency, *c.over_steps, *c.throughput))
    assert load(tmp_path / "record.json") == record


def test_ctrl_c_inside_a_round_keeps_the_samples(tiny: str) -> None:
    """Figures that had begun without a sample are not there."""
    watch = Silent()
    run = bench(tiny, OURS, watch)

    def tick() -> None:
        watch.ticks += 1
        if watch.ticks == 2:
            raise KeyboardInterrupt

    watch.tick = tick  # type: ignore[method-assign]
    record = run.run()
    assert [len(c.latency[0].seconds) for c in record.candidates] == [2, 2]
    assert all(not c.throughput for c in record.candidates)
    record.check()
    assert gc.isenabled()


def test_an_error_leaves_the_record_behind(tiny: str, tmp_path: Path) -> None:
    def fail() -> None:
        raise MemoryError("nothing left")

    run = bench(tiny, OURS, Silent("batch 3: timing", fail))
    run.save = lambda record: record.save(tmp_path / "record.json")
    with pytest.raises(MemoryError):
        run.run()
    record = load(tmp_path / "record.json")
    assert not record.complete
    assert record.notes[-1] == "Ended by MemoryError: nothing left"
    assert len(record.candidates[0].latency) == 1


def test_a_process_that_fails_costs_only_its_figure(tiny: str) -> None:
    def fails(spec: Spec, candidate: str, batch: int) -> dict[str, float]:
        raise ProcessFailed("killed")

    run = bench(tiny, OURS[:1], batches=(1,))
    run.launch = fails
    record = run.run()
    assert record.complete
    assert record.candidates[0].cold_start is None
    assert "No cold start of stepfuse: killed" in record.notes


@pytest.mark.parametrize(("steps", "others"), [(50, [12, 25]), (2, [1]), (1, []), (3, [1])])
def test_other_numbers_of_steps(steps: int, others: list[int]) -> None:
    assert other_steps(steps) == others


def test_the_budget_is_shared_by_what_is_left() -> None:
    budget = Budget(60.0, 3)
    assert budget.share() == 20.0
    budget.spent(10.0)
    assert budget.share() == 25.0
    budget.spent(100.0)
    assert budget.share() == 0.0
    assert Budget(None, 3).share() is None


def test_a_time_limit_bounds_the_rounds(tiny: str) -> None:
    record = bench(tiny, OURS[:1], batches=(1,), rounds=50, time_limit=1e-6).run()
    (c,) = record.candidates
    assert len(c.latency[0].seconds) == LEAST_ROUNDS
    assert len(c.throughput[0].seconds) == LEAST_ROUNDS
    assert record.complete


def test_the_worst_of_all_batches_is_kept() -> None:
    limit = "PSNR of at least 25 dB"
    near, far = Verified(1, 0.2, 40.0, limit, True), Verified(8, 0.1, 30.0, limit, True)
    same, wrong = Verified(2, 0.0, None, limit, True), Verified(2, 1.0, 45.0, limit, False)
    assert far.worse_than(near)
    assert near.worse_than(same)
    assert wrong.worse_than(far)
    assert not any(a.worse_than(b) for a, b in [(near, far), (same, near), (far, wrong)])


def test_what_will_take_long_is_said(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Silent()
    bench(tiny, OURS[:1], watch, batches=(1,)).run()
    assert watch.said == []
    monkeypatch.setattr(measure, "WORTH_SAYING", 0.0)
    bench(tiny, OURS[:1], watch, batches=(1,)).run()
    assert "batch 1: 3 rounds, the least, take up to 0 minutes" in watch.said[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batches": (1, 0)}, "--batch must be at least 1; got 0"),
        ({"batches": ()}, "at least one batch size"),
        ({"batches": (4, 4)}, r"not name a size twice; got \[4, 4\]"),
        ({"rounds": 0}, "--rounds must be at least 1; got 0"),
        ({"time_limit": -1.0}, "--time-limit must be above 0 and finite; got -1"),
        ({"time_limit": float("nan")}, "--time-limit must be above 0 and finite; got nan"),
        ({"processes": -1}, "at least 0; got -1"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(**settings)


def test_the_reason_for_no_energy_is_in_the_record(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(device: Any) -> Counter:
        raise NoCounter("the sun is out")

    monkeypatch.setattr(measure, "counter", none)
    record = bench(tiny, OURS[:1], batches=(1,)).run()
    assert record.candidates[0].energy is not None
    assert record.candidates[0].energy.reason == "the sun is out"
    assert record.candidates[0].energy.joules_per_image == []
