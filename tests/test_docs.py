"""What documents show is run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in ("extending", "generate", "likelihood", "restore", "solvers")
)
COMMANDS = {  # how many there are at the least
    "generate.md": 7,
    "likelihood.md": 5,
    "restore.md": 5,
    "solvers.md": 1,
}


def blocks() -> dict[str, str]:
    """The Python of each block, by the heading it stands under and its number there."""
    found: dict[str, str] = {}
    for document in DOCUMENTS:
        for section in re.split(r"^#+ ", document.read_text(encoding="utf-8"), flags=re.MULTILINE):
            heading = section.partition("\n")[0]
            codes = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
            found.update({f"{heading} {i}": code for i, code in enumerate(codes, 1)})
    return found


def test_there_are_blocks() -> None:
    assert "A pass of one's own 1" in blocks()


@pytest.mark.parametrize("name", blocks())
def test_a_block_runs(name: str, tmp_path: Path) -> None:
    """In a process of its own, so that what it registers is there for itself alone."""
    script = tmp_path / "block.py"
    script.write_text(blocks()[name], encoding="utf-8")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", COMMANDS)
def test_the_commands_run(document: str, tmp_path: Path) -> None:
    """Line by line, in one folder, as a reader would; but what needs a scheduler."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    codes = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    lines = [line for code in codes for line in code.splitlines() if "sbatch" not in line]
    assert len(lines) >= COMMANDS[document]
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "stepfuse"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m stepfuse "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=600,
            env={**os.environ, "PATH": path}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stderr}"
