"""What users get wrong, and what is taken from under a job: one line that says what it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.generate import case

from stepfuse.engine.cli.commands import run
from stepfuse.engine.generate import claims
from stepfuse.engine.generate.claims import Claim
from stepfuse.engine.generate.features import Moments
from stepfuse.engine.generate.job import open_job
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.place import LocalPlace, open_place
from stepfuse.engine.generate.source import open_source


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 7), ("batch_size", 8), ("shard_size", None), ("rounding", "truncate")],
)
def test_settings_that_do_not_fit_the_identity_are_damage(
    tmp_path: Path, name: str, value: object
) -> None:
    """A job.json with them would make other images under the same hash."""
    case.new_job(tmp_path / "run")
    path = tmp_path / "run" / "job.json"
    content = json.loads(path.read_text())
    content["settings"][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=f"is damaged: its settings were changed by hand: .*{name}"
    ):
        open_job(tmp_path / "run")


def test_what_is_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("label\n" + "1\n" * 21)
    case.new_job(tmp_path / "run", conditions=str(rows))
    rows.rename(tmp_path / "elsewhere.csv")
    assert run(["generate", str(tmp_path / "run")]) == 2
    assert f"error: {rows} is not there, and the job in" in capsys.readouterr().err
    (tmp_path / "elsewhere.csv").rename(rows)
    (tmp_path / "run" / "plan.json").unlink()
    assert run(["generate", str(tmp_path / "run")]) == 2
    assert "plan.json is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("raise RuntimeError('no\\nluck')", "cannot import '{name}': RuntimeError: no luck"),
        ("import sys; sys.exit(3)", "cannot import '{name}': it ended the process, with status 3"),
        ("def f(:", "cannot import '{name}': SyntaxError"),
        ("def f(): raise OSError('gone')", "{name}:f: OSError: gone"),
        ("def f(): raise SystemExit(3)", "{name}:f: it ended the process, with status 3"),
        ("def f(x): pass", "{name}:f: f() missing 1 required positional argument"),
        ("def f(): return 3", "{name}:f must return a Checkpoint"),
        (
            "from tests.engine.generate.models import plain\n"
            "def f():\n  made = plain(); made.sample_shape = (8, 8); return made",
            "{name}:f: sample_shape must be (C, H, W); got (8, 8)",
        ),
    ],
)
def test_a_module_of_the_users_is_blamed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, complaint: str
) -> None:
    name = f"users_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(ValueError, match=r"^--model users_") as raised:
        open_source(f"{name}:f")
    assert complaint.format(name=name) in str(raised.value)


def test_what_a_module_prints_is_not_in_the_way_of_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "users_chatty.py").write_text(
        "from tests.engine.generate.models import plain\nprint('imported')\n"
        "def f():\n  print('called'); return plain()\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    open_source("users_chatty:f")
    assert capsys.readouterr() == ("", "imported\ncalled\n")


def test_functions_are_among_what_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"the path of a \.safetensors file, or module:function"):
        open_source("dogs")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--memory", "0"], "--memory must be more than 0 and less than 1e12; got 0"),
        (["--memory", "nan"], "--memory must be more than 0 and less than 1e12; got nan"),
        (["--price-per-hour", "-1", "--dry-run"], "--price-per-hour must be more than 0"),
        (["--price-per-hour", "2"], "--price-per-hour 2 is for --dry-run"),
    ],
)
def test_numbers_that_cannot_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert run(["generate", "-n", "8", "--out", str(tmp_path / "run"), *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--log-json", "--metrics"])
def test_reports_that_cannot_be_written_are_found_before_a_job_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    words = case.options_of("plain", 8, tmp_path / "run", option, str(tmp_path / "no" / "a.prom"))
    assert run(["generate", *words]) == 74
    assert "no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_features_are_numbers() -> None:
    """NaN would be found at the end of the job else, in a distance that is none."""

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels), 2), float("nan"))

    with pytest.raises(ValueError, match="--features gave 2 of 2 numbers that are NaN"):
        Moments(features).add([Made(0, np.zeros((4, 4, 1), np.uint8), None, {})])


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    """Which need not be there, and where claims and renames work."""
    place = open_place(f"file://{tmp_path}/new/run")
    assert isinstance(place, LocalPlace)
    assert place.folder == tmp_path / "new" / "run"
    place.check()


def test_memory_of_this_process_is_no_place_for_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", *case.options_of("plain", 8, Path("x")), "--out", "memory://j"]) == 2
    assert "memory://j is the memory of this process" in capsys.readouterr().err


def test_a_claim_survives_the_removal_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finds the folder empty and removes it before the claim is in it."""
    claim = Claim(open_place(tmp_path / "run"), "job")
    opened, removed = os.open, []

    def slow(path: object, *rest: int, **named: int) -> int:
        if not removed and str(path) == str(claim.path):
            removed.append(path)
            shutil.rmtree(claim.path.parent)
        return opened(path, *rest, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(claims.os, "open", slow)
    assert claim.take()
    assert removed


def _until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_during_the_trial_leaves_nothing(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """And does not say that a job goes on which was never made."""
    folder = tmp_path / "run"
    process = case.start("-n", "64", "--out", str(folder), "--steps", "900")
    _until((folder / "claims" / "job").exists)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.endswith("error: stopped; the same command begins again\n")
    assert not folder.exists()


def test_the_last_line_is_the_command_that_goes_on(tmp_path: Path) -> None:
    """Ctrl-C had a line of its own after it."""
    folder = tmp_path / "run"
    process = case.start(*case.options_of("plain", 80000, folder, "--workers", "1"))
    _until((folder / "records" / "000000.json").exists)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-1] == f"stepfuse generate {folder} goes on"
    assert "error" not in errors
