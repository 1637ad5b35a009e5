"""The gate: ratios to a reference of the same run, judged between two files."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.bench.example_record import example, example_suite

from stepfuse.bench import gate
from stepfuse.bench.significance import CONFIDENCE, Ratio, ratio_of_medians
from stepfuse.bench.suite_file import read

USUAL = {"add_noise[a]": 1e-5, "denoise_step[b]": 2e-3, "unet[c]": 0.4}


def document(
    machine: float = 1.0, slower: dict[str, float] | None = None, scatter: float = 0.02
) -> dict[str, Any]:
    """A file of pytest-benchmark: a machine that is ``machine`` times slower in everything."""
    draw = random.Random(str((machine, slower)))
    rows = []
    for name, usual in USUAL.items():
        own, reference = [], []
        for _ in range(15):
            # what else the machine does meets both of a round
            pace = machine * usual * (1 + 5 * scatter * draw.random())
            own.append(pace * (slower or {}).get(name, 1.0) * (1 + scatter * draw.random()))
            reference.append(3 * pace * (1 + scatter * draw.random()))
        file = "suite_unet" if name.startswith("unet") else f"bench_{name.partition('[')[0]}"
        rows.append(
            {
                "group": name.partition("[")[0],
                "fullname": f"bench/{file}.py::test_{name}",
                "param": "x",
                "extra_info": {
                    "reference": "eager",
                    "reference_seconds": reference,
                    "dtype": "float32",
                },
                "stats": {"data": own},
            }
        )
    return {"benchmarks": rows}


def status(tmp_path: Path, before: Any, after: Any, *options: str) -> int:
    paths = tmp_path / "before.json", tmp_path / "after.json"
    for path, content in zip(paths, (before, after), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return gate.main([*map(str, paths), *options])


def test_a_slower_machine_is_not_a_regression(tmp_path: Path) -> None:
    assert status(tmp_path, document(), document(machine=40.0)) == 0


def test_a_slower_benchmark_fails_on_a_faster_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = document(machine=0.25, slower={"denoise_step[b]": 1.3})
    assert status(tmp_path, document(), after) == 1
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "SLOWER" in line)
    assert "denoise_step[b]" in line
    assert 1.27 < float(re.findall(r"\d\.\d\d", line)[0]) < 1.33  # the factor, and its scatter
    assert "3 compared, 1 slower beyond 1.15, 0 gone" in out


@pytest.mark.parametrize(("allow", "expected"), [("1.2", 1), ("1.4", 0)])
def test_allow_is_the_factor(tmp_path: Path, allow: str, expected: int) -> None:
    after = document(slower={"unet[c]": 1.3})
    assert status(tmp_path, document(), after, "--allow", allow) == expected


def test_noise_alone_does_not_fail(tmp_path: Path) -> None:
    """Above the factor, but not beyond what the samples scatter."""
    before, after = document(), document()
    after["benchmarks"][0]["stats"]["data"][:8] = [
        1.5 * s for s in before["benchmarks"][0]["stats"]["data"][:8]
    ]
    after["benchmarks"][0]["stats"]["data"][8:] = [
        0.7 * s for s in before["benchmarks"][0]["stats"]["data"][8:]
    ]
    after["benchmarks"][0]["extra_info"] = before["benchmarks"][0]["extra_info"]
    found = gate.compare(_beside(tmp_path, before), _beside(tmp_path, after))
    (noisy,) = (f for f in found if "add_noise" in f.name)
    assert noisy.change.value > gate.ALLOWED
    assert not noisy.failed
    assert status(tmp_path, before, after) == 0


def _beside(tmp_path: Path, content: dict[str, Any]) -> dict[str, gate.Beside]:
    (tmp_path / "one.json").write_text(json.dumps(content))
    return gate.benchmarks(read(tmp_path / "one.json"))


def test_a_benchmark_that_is_gone_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = document()
    del after["benchmarks"][1]
    assert status(tmp_path, document(), after) == 1
    assert "only in BEFORE: kernels: denoise_step[b]: stepfuse" in capsys.readouterr().out
    assert status(tmp_path, document(), after, "--missing-ok") == 0
    assert status(tmp_path, after, document()) == 0  # a new one is no reason


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("{", "no file of the suites"),
        ("[]", "no file of the suites"),
        ({"benchmarks": []}, "no benchmark in common"),
        ({"benchmarks": [{"fullname": "x"}]}, "no file of the suites"),
        ({"rows": []}, "benchmarks"),
    ],
)
def test_an_unusable_file_is_said(
    tmp_path: Path, after: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(tmp_path, document(), after) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_another_reference_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = document()
    after["benchmarks"][2]["extra_info"]["reference"] = "copy"
    assert status(tmp_path, document(), after) == 2
    assert "'eager' before and 'copy' after" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("allow", ["0.9", "nan"])
def test_a_factor_below_one_is_refused(
    tmp_path: Path, allow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(tmp_path, document(), document(), "--allow", allow) == 2
    assert "at least 1" in capsys.readouterr().err


def test_records_are_read_too(tmp_path: Path) -> None:
    record = example_suite()
    record.save(tmp_path / "suite.json")
    found = gate.benchmarks(read(tmp_path / "suite.json"))
    assert [name.rpartition(": ")[2] for name in found] == ["stepfuse", "eager"] * 2
    own, copy = record.suite[0], record.suite[2]
    name = f"kernels: {own.group}: stepfuse"
    assert found[name].ratios[3] == own.seconds[3] / copy.seconds[3]
    assert found[name].reference == "copy"
    record = example()  # whole loops and no suites
    record.save(tmp_path / "loops.json")
    assert gate.main([str(tmp_path / "loops.json")] * 2) == 2


def test_the_interval_holds_the_true_ratio() -> None:
    """Over many draws of known medians; three standard deviations of 300 of them are 1.7 %."""
    generator = np.random.default_rng(1)
    truth, held = 1.4, 0
    for _ in range(300):
        new, old = np.exp(generator.normal(0, 0.1, (2, 15)))
        found = ratio_of_medians((truth * new).tolist(), old.tolist())
        held += found.low <= truth <= found.high
    assert abs(held / 300 - CONFIDENCE) < 0.02


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(1.2, 1.1, 1.3), "slower"),
        (Ratio(1.2, 0.9, 1.5), "within the spread"),
        (Ratio(1.02, 1.01, 1.03), "within the spread"),  # two runs of one program differ so much
        (Ratio(0.8, 0.7, 0.9), "faster"),
        (Ratio(0.8, 0.7, 1.1), "within the spread"),
        (Ratio(0.98, 0.97, 0.99), "within the spread"),
        (ratio_of_medians([1.05, 1.06, 1.07], [1.0, 1.01, 1.02]), "within the spread"),  # three
        (ratio_of_medians([1.3, 1.31, 1.32], [1.0, 1.01, 1.02]), "slower"),
    ],
)
def test_verdicts(ratio: Ratio, verdict: str) -> None:
    assert ratio.verdict == verdict


@pytest.mark.parametrize("samples", [[], [1.0, 0.0], [1.0, -2.0], [float("nan")]])
def test_what_is_no_time_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        ratio_of_medians(samples, [1.0])
