"""The suites: verified before they are timed, a reference in every round, one file at the end."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepfuse.bench import gate, timing
from stepfuse.bench.suite import LEAST_ROUNDS, Timed
from stepfuse.bench.suite_file import read

ROOT = Path(__file__).parents[2]
SUITES = ("kernels", "unet", "sampler", "adapters")


class Benchmark:
    """pytest-benchmark's fixture, as far as it is used, with a clock that ticks 2 a call."""

    def __init__(self) -> None:
        self.name = "test_something[case]"
        self.extra_info: dict[str, Any] = {}
        self.group: str | None = None
        self.stats: Any = None
        self.rounds = 0

    def pedantic(self, target: Any, teardown: Any, rounds: int, iterations: int) -> None:
        self.rounds, data = rounds, []
        for _ in range(rounds):
            for _ in range(iterations):
                target()
            data.append(2.0)
            teardown()
        target()  # for the result, as pytest-benchmark does
        teardown()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


@pytest.fixture
def _one_call_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)


def timed(fixture: Timed, calls: list[str], verify: Any = lambda: None) -> None:
    fixture(
        lambda: calls.append("ours"),
        beside=lambda: calls.append("theirs"),
        reference="eager",
        dtype="float32",
        group="a group",
        verify=verify,
    )


def test_a_wrong_result_is_never_timed() -> None:
    benchmark, calls = Benchmark(), []

    def wrong() -> None:
        raise AssertionError("off by 3")

    with pytest.raises(AssertionError, match="off by 3"):
        timed(Timed(benchmark), calls, wrong)
    assert calls == []
    assert benchmark.stats is None


@pytest.mark.usefixtures("_one_call_a_block")
def test_ours_and_the_reference_take_turns() -> None:
    benchmark, calls = Benchmark(), []
    timed(Timed(benchmark, rounds=4), calls, lambda: {"error": 1e-6})
    warm_up = 2 * ["ours"] + 2 * ["theirs"]
    assert calls == warm_up + 5 * ["ours", "theirs"]
    extra = benchmark.extra_info
    assert (extra["reference"], extra["dtype"], extra["error"]) == ("eager", "float32", 1e-6)
    assert benchmark.group == "a group"
    assert len(extra["reference_seconds"]) == 4
    assert extra["ratio"] == statistics.median(2.0 / s for s in extra["reference_seconds"])


@pytest.mark.usefixtures("_one_call_a_block")
def test_long_calls_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for budget, expected in ((100.0, 21), (12.0, 12), (1.0, LEAST_ROUNDS)):
        lasts = iter([0.8, 0.2])  # a block of ours, of theirs

        def size(work: timing.Work, timer: Any, lasts: Any = lasts) -> None:
            work.calls, work.lasts = 1, next(lasts)

        monkeypatch.setattr(timing.Work, "size", size)
        benchmark = Benchmark()
        timed(Timed(benchmark, rounds=21, budget=budget), [])
        assert benchmark.rounds == expected


def test_one_of_the_suites_and_what_it_leaves(tmp_path: Path) -> None:
    """In a process of its own: what there is, then one benchmark, its file, and the gate."""
    path = tmp_path / "suites.json"
    code = f"""
import pytest

class Listed:
    @pytest.hookimpl(tryfirst=True)  # before -k takes its choice
    def pytest_collection_modifyitems(self, items):
        print(*(item.nodeid for item in items), sep="\\n")

options = ["--rounds", "3", "--benchmark-json", {str(path)!r}, "-p", "no:cacheprovider"]
which = "test_philox and SD and float32"
chosen = ["bench", "--benchmark-only", "-q", "-k", which, *options]
raise SystemExit(pytest.main(chosen, plugins=[Listed()]))
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for name in ("bench_add_noise.py::test_add_noise", "bench_denoise_step.py::test_denoise_step",
                 "bench_group_norm_silu.py::test_group_norm_silu", "bench_philox.py::test_philox",
                 "bench_convolve.py::test_convolve", "bench_attention.py::test_attention",
                 "bench_concatenate.py::test_concatenate",
                 "suite_unet.py::test_unet[digits-1-float32]",
                 "suite_unet.py::test_unet[ddpm_cifar10-8-bfloat16]",
                 "suite_sampler.py::test_sampler[digits-1-captured]"):  # fmt: skip
        assert f"bench/{name}" in found.stdout, name
    ours, eager = read(path)
    assert (ours.suite, ours.name, ours.reference) == ("kernels", "stepfuse", "eager")
    assert (eager.name, eager.dtype) == ("eager", "float32")
    assert ours.group == eager.group == "philox[SD-1.5-shape2-float32]"
    assert len(ours.seconds) == len(eager.seconds) == 3
    assert min(ours.seconds + eager.seconds) > 0
    assert ours.bytes == 16 * 4 * 64 * 64 * 4
    document = json.loads(path.read_text())
    assert document["machine_info"]["stepfuse"]["torch"]
    assert gate.main([str(path), str(path)]) == 0


def test_the_suites_are_not_part_of_the_tests(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
    patterns = pytestconfig.getini("python_files")
    own = {
        path for p in patterns if not p.startswith("test_") for path in ROOT.glob(f"tests/**/{p}")
    }
    assert own == set()


@pytest.mark.parametrize("name", [*SUITES[1:], None])
def test_rows_know_their_suite(tmp_path: Path, name: str | None) -> None:
    file = "bench_add_noise" if name is None else f"suite_{name}"
    row = {
        "group": "g", "fullname": f"bench/{file}.py::test_x[a::b]", "param": "a::b",
        "extra_info": {"reference": "eager", "reference_seconds": [2.0], "dtype": "bfloat16"},
        "stats": {"data": [1.0]},
    }  # fmt: skip
    (tmp_path / "f.json").write_text(json.dumps({"benchmarks": [row]}))
    own, _ = read(tmp_path / "f.json")
    assert (own.suite, own.group) == (name or "kernels", "x[a::b]")
    assert own.parameters == {"group": "g", "case": "a::b"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_bench_runs_everything_into_one_file_and_one_report() -> None:
    def planned(*arguments: str) -> str:
        return subprocess.run(
            ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    plan = planned("bench", "BENCH=--quick")
    suites = plan.index("pytest bench --benchmark-only")
    loops = plan.index("stepfuse bench --model digits --quick --out bench/out/parts")
    report = plan.index("stepfuse.bench.report bench/out/parts/record.json")
    assert suites < loops < report
    assert "--json bench/out/bench.json --out bench/out/report.html" in plan
    for target, module in (("unet", "unet"), ("kernels", "philox"), ("sampler", "sampler")):
        assert f"stepfuse.bench.bench_{module}" in planned(f"bench-{target}")
