"""Texts that name places: links lead to files, and names of modules to modules.

CHANGELOG.md is left out, which tells of what was.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "bench", "csrc", "kernels", "engine", "scripts", "src")
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))]
    if path.name != "CHANGELOG.md" and ROOT / "bench" / "out" not in path.parents
)
SOURCES = sorted(
    path.relative_to(ROOT) for name in (*FOLDERS, "tests") for path in (ROOT / name).rglob("*.py")
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
# `engine/files/writing.py`, but no pattern like `kernels/<op>.py`
PLACE = re.compile(r"`((?:engine|kernels|bench|csrc|docs|scripts|tests)/[\w./-]*)`")
# what `make bench` writes, and the file of which the text says that there must be none
NOT_THERE = ("bench/out/", "kernels/__init__.py")
MODULE = re.compile(r"\bstepfuse((?:\.\w+)+)(?![\w{])")

IMPORT = re.compile(r"\bfrom stepfuse(\.[\w.]+) import (\w+)")  # also in programs that tests write


def is_there(names: str) -> bool:
    """Whether ".engine.files.writing.write_file" is a module and what stands in it."""
    at, words = ROOT, names.split(".")[1:]
    while words and (at / words[0]).is_dir():
        at /= words.pop(0)
    if words and (module := at / f"{words[0]}.py").is_file():
        words = words[1:]
    elif not words or (module := at / "__init__.py").is_file():
        module = at / "__init__.py"
    else:
        return False
    # where a function or class is named, perhaps with an attribute of its own, the module knows it
    inside = module.read_text(encoding="utf-8") if words else ""
    return not words or re.search(rf"\b{words[0]}\b", inside) is not None


def wrong(text: str) -> list[str]:
    """What of a text names no module: "stepfuse" and one of the three folders come first."""
    named = {*MODULE.findall(text), *map(".".join, IMPORT.findall(text))}
    ours = {name for name in named if name.split(".")[1] in ("engine", "kernels", "bench")}
    return sorted(name for name in ours if not is_there(name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_and_paths_lead_to_files(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [(ROOT / document.parent / link) for link in LINK.findall(text)]
    paths = [ROOT / place for place in PLACE.findall(text) if not place.startswith(NOT_THERE)]
    assert [str(path) for path in (*links, *paths) if not path.exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documents_name_modules_that_are_there(document: Path) -> None:
    assert wrong((ROOT / document).read_text(encoding="utf-8")) == []


def test_sources_name_modules_that_are_there() -> None:
    found = {str(path): wrong((ROOT / path).read_text(encoding="utf-8")) for path in SOURCES}
    del found["tests/test_house.py"]  # whose examples are of houses of their own
    assert len(found) > 300
    assert {path: names for path, names in found.items() if names} == {}


def test_a_name_that_leads_nowhere_is_found() -> None:
    assert wrong("see stepfuse.engine.files.writing.write_file, stepfuse.kernels.philox.") == []
    assert wrong("stepfuse.engine.adapters.accelerate, stepfuse.engine.sampling, sf.Sampler") == []
    assert wrong(f"from {'stepfuse'}.engine import images") == [".engine.images"]
    for name in (".engine.table", ".engine.files.writing.no_such", ".kernels.philox.no_such.thing"):
        assert wrong(f"`stepfuse{name}` says more") == [name]
