"""docs/adapters.md: what its tables claim is what is tested."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parents[2] / "docs" / "adapters.md"
LIBRARIES = ["diffusers", "denoising-diffusion-pytorch", "guided-diffusion"]
NAMED = re.compile(r"`(test_\w+\.py)::(\w+)`")


def tables() -> list[list[list[str]]]:
    """Every table of the page: rows of cells, the header first."""
    found: list[list[list[str]]] = [[]]
    for line in PAGE.read_text().splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def matrix() -> list[list[str]]:
    """The rows of feature x library, without header and rule."""
    (table,) = (t for t in tables() if t[0] == ["feature", *LIBRARIES])
    return table[2:]


def place(file: str) -> Path | None:
    """Where a file of tests is: here, or beside what it tests elsewhere in the engine."""
    return next(TESTS.parent.rglob(file), None)


@functools.cache
def functions(file: str) -> set[str]:
    """The tests that a file defines."""
    found = place(file)
    assert found is not None, f"{file} does not exist"
    tree = ast.parse(found.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_matrix_says_yes_no_or_none_of_every_library() -> None:
    rows = matrix()
    assert len(rows) > 20
    assert len({row[0] for row in rows}) == len(rows)
    for feature, *cells in rows:
        assert len(cells) == len(LIBRARIES), feature
        for cell in cells:
            assert re.match(r"(yes|no: \w|none$)", cell), f"{feature}: {cell!r}"


@pytest.mark.parametrize("row", matrix(), ids=lambda row: row[0])
def test_every_yes_names_a_test(row: list[str]) -> None:
    for library, cell in zip(LIBRARIES, row[1:], strict=True):
        assert NAMED.search(cell) or not cell.startswith("yes"), f"{row[0]}, {library}: no test"


def test_every_named_test_exists() -> None:
    named = NAMED.findall(PAGE.read_text())
    assert len(named) > 50
    for file, name in named:
        assert name in functions(file), f"{file} has no {name}"
        assert name.startswith("test_")


def test_a_test_belongs_to_the_library_of_its_column() -> None:
    """Files are named after the adapter that they test."""
    prefixes = dict(
        zip(LIBRARIES, ("test_diffusers_", "test_lucidrains", "test_guided_|test_adm"), strict=True)
    )
    for row in matrix():
        for library, cell in zip(LIBRARIES, row[1:], strict=True):
            for file, _ in NAMED.findall(cell):
                assert re.match(prefixes[library], file), f"{row[0]}: {file} under {library}"
    for row in next(t for t in tables() if t[0][0] == "library")[2:]:
        for file, _ in NAMED.findall(row[-1]):
            assert re.match(prefixes[row[0]], file), f"{file} beside {row[0]}"


def test_what_the_page_imports_is_there() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    imports = [
        node
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom)
    ]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        for alias in node.names:
            assert hasattr(module, alias.name)
