"""The table of solvers: what it counts, and that its document says what its record has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stepfuse.bench import solvers

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "bench" / "results" / "solvers.json"


def test_frechet_distance_of_known_gaussians() -> None:
    """Between N(0, 1) and N(m, s^2) in every feature: F (m^2 + (1 - s)^2)."""
    a, b = torch.randn(2, 100_000, 4, dtype=torch.float64)
    assert solvers.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert solvers.frechet(a, 3 * b + 2) == pytest.approx(4 * (4 + 4), rel=0.02)
    turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert solvers.frechet(a @ turned, (3 * b + 2) @ turned) == pytest.approx(
        solvers.frechet(a, 3 * b + 2), rel=1e-9
    )


@pytest.mark.parametrize("evaluations", solvers.EVALUATIONS)
def test_heun_takes_no_more_than_it_may(evaluations: int) -> None:
    steps = solvers.steps_for("heun", evaluations)
    assert evaluations - 1 <= 2 * steps - 1 <= evaluations
    assert solvers.steps_for("dpmpp", evaluations) == evaluations


def test_what_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file of Python with load_judge"):
        solvers.load_judge(tmp_path / "nobody.py")
    with pytest.raises(SystemExit):
        solvers.main(["--count", "3"])


def test_the_judge_has_features() -> None:
    judge = solvers.load_judge(ROOT / "tests" / "data" / "judge.py")
    found = solvers.features(judge, torch.randn(3, 1, 32, 32))
    assert found.shape == (3, 32)
    assert bool(found.isfinite().all())


def test_the_document_says_what_the_record_has() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["schema"] == solvers.SCHEMA
    text = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")
    number = r"([\d.]+)"
    row_of = rf"^\| ([\w+ .-]+) \| (\d+) \| {number} % \| {number} \| {number} \|$"
    lines = re.findall(row_of, text, re.MULTILINE)
    assert len(lines) == len(record["rows"]) == 21
    for line, row in zip(lines, record["rows"], strict=True):
        name, evaluations, *numbers = line
        assert (name.strip(), int(evaluations)) == (row["solver"], row["evaluations"])
        measured = [100 * row["agreement"], row["frechet"], row["rms"]]
        rounding = np.array([0.0501, 0.000501, 0.0000501])
        assert np.all(np.abs(np.array(measured) - np.array(numbers, dtype=float)) <= rounding)
    assert f"{record['count']} images" in text
