"""``stepfuse bench`` from its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.bench.example_record import example
from tests.signalled import start

from stepfuse.bench import roofline, running
from stepfuse.bench.record import load
from stepfuse.bench.roofline import Row
from stepfuse.engine.cli import run

pytestmark = pytest.mark.usefixtures("hasty")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bench(*options: str) -> int:
    return run(["bench", *options])


def short(model: str, *options: str) -> int:
    """Two steps, two rounds, nothing that takes a process of its own."""
    few = ("--steps", "2", "--rounds", "2", "--batch", "1", "--no-cold", "--no-optimize")
    return bench("--model", model, *few, *options)


def test_a_run_leaves_record_tables_and_report(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = "1"
    assert short(tiny, "--threads", threads, "--seed", "3", "--eta", "0.5") == 0
    record = load("stepfuse-bench/record.json")
    assert record.complete
    assert record.settings is not None
    assert (record.settings.model, record.settings.steps) == (tiny, 2)
    assert (record.settings.seed, record.settings.eta) == (3, 0.5)
    assert record.machine.threads == 1
    assert record.candidate("stepfuse").cold_start is None
    shown = capsys.readouterr()
    assert "stepfuse" in shown.out
    for name in ("record.json", "report.md", "report.html"):
        assert f"wrote stepfuse-bench/{name}" in shown.out
        assert (Path("stepfuse-bench") / name).stat().st_size > 500
    assert sorted(os.listdir("stepfuse-bench")) == ["record.json", "report.html", "report.md"]


def test_files_go_where_they_are_wanted(tiny: str) -> None:
    Path("deep").mkdir()
    files = ("--json", "deep/a.json", "--markdown", "b.md", "--html", "new/c.html")
    assert short(tiny, *files, "--out", "unused") == 0
    assert load("deep/a.json").complete
    assert Path("b.md").read_text()
    assert Path("new/c.html").read_text().startswith("<!DOCTYPE html>")
    assert not Path("unused").exists()


def test_quick_gives_way_to_what_is_given(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(running, "run", lambda **given: seen.update(given))
    assert bench("--quick", "--rounds", "9", "--batch", "2,4") == 0
    assert (seen["spec"]["steps"], seen["rounds"], seen["batch"]) == (10, 9, "2,4")
    assert (seen["time_limit"], seen["processes"]) == (30.0, 1)
    assert bench("--steps", "7", "--time-limit", "0", "--no-cold") == 0
    assert (seen["spec"]["steps"], seen["rounds"], seen["batch"]) == (7, 15, "1,8,32")
    assert (seen["time_limit"], seen["processes"]) == (0.0, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--against", "tvm"], "--against must be of diffusers, compile, onnxruntime, openvino"),
        (["--steps", "0"], "steps must be in 1 .. 100 (num_train_timesteps); got 0"),
        (["--steps", "101"], "steps must be in 1 .. 100 (num_train_timesteps); got 101"),
        (["--steps", "few"], "'few'"),
        (["--batch", "1,0"], "--batch must be at least 1; got 0"),
        (["--batch", "one"], "--batch must be whole numbers like 1,8,32; got 'one'"),
        (["--batch", ","], "--batch must name at least one batch size"),
        (["--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["--time-limit", "-3"], "--time-limit must be above 0 and finite; got -3"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, bf16; got 'fp8'"),
        (["--dtype", "bf16", "--no-optimize"], "--dtype bf16 needs --optimize"),
        (["--method", "euler"], "euler"),
        (["--spacing", "odd"], "spacing must be one of"),
        (["--graph", "whole"], "--graph must be one of auto, step, loop, none; got 'whole'"),
        (["--backend", "metal"], "metal"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["--eta", "nan"], "eta"),
        (["--threads", "0"], "--threads must be at least 1; got 0"),
        (["--json", "x.out", "--html", "x.out"], "three different files are written"),
        (["--static", "--compare", "a.json", "b.json"], "commands of their own; got both"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_be_meant_is_one_line(
    options: list[str], said: str, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is built or written."""
    assert bench("--model", tiny, *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "missing.safetensors"], "unknown --model 'missing.safetensors'"),
        (["--out", "no/such/place"], "folder no/such/place does not exist"),
        (["--json", "no/such/place.json"], "folder no/such does not exist"),
        (["--out", "file"], "file is not a folder"),
        (["--compare", "a.json", "file"], "there is no file a.json"),
        (["--compare", "file", "file"], "file is no record of stepfuse bench"),
        (["--model", "file"], "file"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_files_that_are_not_what_they_should_be(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("words")
    assert bench(*options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert Path("file").read_text() == "words"
    assert os.listdir() == ["file"]


def test_two_records_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    example().save("a.json")
    example(faster=2.0, seed=1).save("b.json")
    assert bench("--compare", "a.json", "b.json") == 0
    assert "faster" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["a.json", "b.json"]


def row(variant: str) -> Row:
    return Row(
        variant=variant,
        arch=90,
        card="H100 SXM",
        gigabytes_per_second=3350,
        kernels=("k",),
        registers=(40,),
        shared_bytes=(2048,),
        spilled=False,
        vector_bits=128,
        bytes_per_element=12.0,
        microseconds=3.7,
        unfused_bytes_per_element=60.0,
        unfused_microseconds=18.0,
    )


def test_the_static_table_has_files_of_its_own(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a report that is made later in the same folder shows it."""
    pytest.importorskip("triton")
    monkeypatch.setattr(roofline, "static_table", lambda: [row("denoise_step of a test")])
    assert bench("--static") == 0
    record = load("stepfuse-bench/roofline.json")
    assert (record.kind, record.roofline[0]["registers"]) == ("roofline", [40])
    assert "denoise_step of a test" in capsys.readouterr().out
    assert short(tiny) == 0
    assert "denoise_step of a test" in Path("stepfuse-bench/report.html").read_text()
    assert load("stepfuse-bench/roofline.json") == record


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--help") == 0
    shown = capsys.readouterr().out
    for word in ("--against", "--compare", "Examples", "stepfuse bench --quick"):
        assert word in shown


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_on_the_command_keeps_the_record(tiny: str, tmp_path: Path) -> None:
    """A real signal, once the first figure is on the disk."""
    command = [sys.executable, "-m", "stepfuse", "bench", "--model", tiny, "--steps", "2"]
    started = start(
        [*command, "--no-cold", "--no-optimize", "--rounds", "1000000", "--batch", "1,2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert started.stderr is not None
    for line in started.stderr:
        if "one loop at a time" in line:
            break
    time.sleep(1.0)
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "interrupted; what had been measured is in stepfuse-bench/record.json" in error
    assert "Traceback" not in error
    record = load(tmp_path / "stepfuse-bench" / "record.json")
    assert not record.complete
    assert len(record.candidates[0].latency[0].seconds) >= 1
    assert json.loads((tmp_path / "stepfuse-bench" / "record.json").read_text())["notes"]
