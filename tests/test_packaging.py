"""What `pip install stepfuse[...]` brings, and what make does in which order."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli", reason="needs Python 3.11, or tomli")

# libraries that ask for a torch build of their own, directly or by way of another
CHOOSE_TORCH = {"torchvision", "torchaudio", "denoising-diffusion-pytorch", "azula", "pytorch-fid"}
FOR_US = ("test",)  # extras that only whoever works on the project installs
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def extras() -> dict[str, list[str]]:
    document: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = document["project"]["optional-dependencies"]
    return found


def name_of(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def brought(extra: str) -> set[str]:
    """Everything that pip installs for it, as far as it is installed here."""
    named: set[str] = set()
    left = list(extras()[extra])
    while left:
        requirement = left.pop()
        name = name_of(requirement)
        if name == "stepfuse":
            inner = re.search(r"\[(.*)\]", requirement)
            left += [r for e in (inner[1] if inner else "").split(",") for r in extras()[e.strip()]]
        elif name not in named:
            named.add(name)
            try:
                left += [r for r in requires(name) or () if "extra ==" not in r]
            except PackageNotFoundError:
                continue
    return named


@pytest.mark.parametrize("extra", [name for name in extras() if name not in FOR_US])
def test_no_extra_lets_pip_exchange_the_torch_that_is_there(extra: str) -> None:
    assert brought(extra) & CHOOSE_TORCH == set()


def test_the_extra_of_the_adapters_installs_nothing_and_that_of_the_tests_every_library() -> None:
    assert extras()["adapters"] == []
    assert {"denoising-diffusion-pytorch", "diffusers", "peft"} <= brought("test")


def test_what_the_tests_compare_with_is_pinned() -> None:
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"peft", "diffusers", "transformers", "denoising-diffusion-pytorch"} <= pinned


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """As `make sample` leaves it: the project is installed, its sources are older."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "installed").touch()
    return tmp_path


def planned(venv: Path, *arguments: str) -> str:
    return subprocess.run(
        ["make", "--dry-run", f"VENV={venv}", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@needs_make
@pytest.mark.parametrize("target", ["test", "bench-suites"])
def test_the_modules_are_built_once(venv: Path, target: str) -> None:
    plan = planned(venv, target)
    assert "--editable" not in plan
    assert "constraints.txt 'stepfuse[test]'" in plan
    touched = planned(venv, target, "--what-if=csrc/convolve.cpp")
    assert touched.count("--editable .") == 1
    assert touched.index("--editable .") < touched.index("stepfuse[test]")


@needs_make
def test_the_sanitizers_have_modules_of_their_own(venv: Path) -> None:
    plan = planned(venv, "sanitize")
    assert "build_ext --sanitize --force --build-lib build/sanitize" in plan
    assert plan.count("tests/kernels/test_cpp.py tests/kernels/test_fuzz.py") == 2
    assert "--inplace" not in plan
