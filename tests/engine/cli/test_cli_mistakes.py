"""Every option of every command with values it cannot have: one line, exit status 2, no file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.cli.cli_case import process
from tests.engine.cli.cli_mistakes import (
    DAMAGED,
    FOLDER,
    GOOD,
    KEPT,
    PICTURES,
    TOLD,
    USUAL,
    is_flag,
    lines,
    options_of,
    pictures,
)

from stepfuse.engine.cli import commands, run

CASES = [(name, line) for name in USUAL for line in lines(name)]
LEAST_CASES = 250


@pytest.fixture(autouse=True)
def _files(tiny: str, empty_folder: Path) -> None:
    """A model, one that is damaged, a data set, and places that take no file."""
    os.link(tiny, GOOD)
    Path(DAMAGED).write_bytes(Path(tiny).read_bytes()[:100])
    np.savez(PICTURES, **pictures())
    Path(FOLDER).mkdir()
    Path(FOLDER, "a.txt").write_text("kept")
    Path("locked").mkdir()
    Path("locked", "state.pt").write_bytes(b"of another run")


def check_line(status: int, out: str, err: str) -> None:
    """One line that says something, and nothing beside it."""
    assert status == 2, err
    assert re.fullmatch(r"error: \S.{8,}\n", err), err
    assert "Traceback" not in err
    assert "--debug shows where" not in err
    assert out == ""
    assert sorted(os.listdir()) == sorted(KEPT)
    assert os.listdir(FOLDER) == ["a.txt"]


def test_every_option_of_every_command_is_tried() -> None:
    registered = commands.app.registered_commands
    assert set(USUAL) == {c.name or getattr(c.callback, "__name__", "") for c in registered}
    for name in USUAL:
        options = options_of(name)
        with_values = {option for option in options if not is_flag(options[option])}
        assert set(TOLD[name]) == with_values
    assert len(CASES) >= LEAST_CASES


@pytest.mark.parametrize(
    ("name", "line"), CASES, ids=lambda v: " ".join(v)[-60:] if isinstance(v, list) else v
)
def test_a_bad_line(name: str, line: list[str], capsys: Any) -> None:
    status = run([name, *line])
    captured = capsys.readouterr()
    check_line(status, captured.out, captured.err)


@pytest.mark.parametrize(
    "words", [["nonsense"], ["--nonsense"], ["--nonsense", "sample"]], ids=" ".join
)
def test_no_such_command(words: list[str], capsys: Any) -> None:
    status = run(words)
    captured = capsys.readouterr()
    check_line(status, captured.out, captured.err)


@pytest.mark.parametrize(
    "line",
    [
        ["sample", *USUAL["sample"], "--steps", "abc"],
        ["sample", *USUAL["sample"], "-o", "missing/x.png"],
        ["export", *USUAL["export"], "--batch", "8:4:1"],
        ["train", *USUAL["train"], "--learning-rate", "nan"],
        ["bench", *USUAL["bench"], "--rounds", "0"],
        ["doctor", "stray"],
    ],
    ids=" ".join,
)
def test_a_bad_line_in_a_process(line: list[str]) -> None:
    done = process(*line)
    check_line(done.returncode, done.stdout, done.stderr)
