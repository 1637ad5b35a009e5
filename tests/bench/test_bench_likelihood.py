"""The benchmark of the bound: bits first, times only for what is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepfuse.bench import bench_likelihood

pytestmark = pytest.mark.filterwarnings("ignore:.*bits/dim over")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_likelihood, "CASES", ((2, 3),))


def test_a_case_is_compared_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    bench_likelihood.main(["--rounds", "2", "--json", str(file)])
    (row,) = json.loads(file.read_text())["cases"]
    assert (row["images"], row["steps"]) == (2, 3)
    assert all(0 <= value <= bench_likelihood.NEAR for value in row["difference"].values())
    assert {name: len(seconds) for name, seconds in row["samples"].items()} == {
        bench_likelihood.LOOP: 2, "eager": 2, "optimized": 2,
    }  # fmt: skip
    assert "optimized, first call" in " ".join(capsys.readouterr().out.split())


def test_wrong_bits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(self: bench_likelihood.Work) -> Tensor:
        return torch.zeros(2, dtype=torch.float64)

    monkeypatch.setattr(bench_likelihood.Work, "theirs", theirs)
    monkeypatch.setattr(bench_likelihood, "Turns", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match="optimized: bits/dim differ by"):
        bench_likelihood.main(["--rounds", "1"])


def test_no_such_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_likelihood.main(["--images", "3"])
    assert "--images must be one of 2; got 3" in capsys.readouterr().err
