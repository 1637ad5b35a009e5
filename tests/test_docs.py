"""What documents show is run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "extending.md"


def blocks() -> dict[str, str]:
    """The Python of each block, by the heading it stands under and its number there."""
    found: dict[str, str] = {}
    for section in re.split(r"^#+ ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE):
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
