"""The house: who imports whom, read from the sources with `ast`.

Nothing imports upward, and there is no circle. Imports inside functions and under TYPE_CHECKING
count like any other: they say what a file has to know.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "stepfuse"

# A floor imports from itself and from those before it.
FLOORS = (
    ("kernels",),
    ("engine/compile", "engine/replay"),
    ("engine/sampling", "engine/networks", "engine/files"),
    ("engine/adapters", "engine/export", "engine/training", "engine/generate"),
    ("engine/cli", "bench"),
)
FLOOR_OF = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
ROOF = len(FLOORS) - 1  # of `stepfuse` itself, which knows every public name
GROUND = f"{PACKAGE}/_version"

Edges = dict[str, set[str]]


def places(root: Path) -> dict[str, Path]:
    """Every module by its place, "kernels/philox" say, a package by that of its folder."""
    found = [
        path for name in ("kernels", "engine", "bench") for path in (root / name).rglob("*.py")
    ]
    named = {path.relative_to(root).with_suffix(""): path for path in found}
    # the folder of the package holds links to the other three, which are not followed
    named |= {Path(PACKAGE, p.stem): p for p in (root / "src" / PACKAGE).glob("*.py")}
    return {str(at.parent if at.name == "__init__" else at): path for at, path in named.items()}


def floor(place: str) -> int | None:
    """The number of the floor, None for what has none."""
    top, *rest = place.split("/")
    if top == PACKAGE:
        return 0 if place == GROUND else ROOF
    return FLOOR_OF.get(f"{top}/{rest[0]}" if top == "engine" and rest else top)


def imports(root: Path) -> Edges:
    """The places that every module imports; a folder without ``__init__.py`` is a place, too."""
    modules = places(root)
    known = {*modules, *(str(parent) for place in modules for parent in Path(place).parents)}
    edges: Edges = {}
    for place, path in modules.items():
        at = tuple(place.removeprefix(f"{PACKAGE}/").split("/")) if place != PACKAGE else ()
        package = at if path.name == "__init__.py" else at[:-1]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {"/".join(words) or PACKAGE for words in _imported(tree, package)}
        inside = {f"{PACKAGE}/{name}" for name in found} & modules.keys()
        edges[place] = {*(found & known), *inside} - {place}
    return edges


def _imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What the statements of a module of ``package`` name, as words behind "stepfuse".

    ``from a import b`` names a and a.b, since b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, *words = alias.name.split(".")
                if top == PACKAGE:
                    yield tuple(words)
        elif isinstance(node, ast.ImportFrom):
            words = node.module.split(".") if node.module else []
            if node.level:
                base = (*package[: len(package) - node.level + 1], *words)
            elif words[0] == PACKAGE:
                base = tuple(words[1:])
            else:
                continue
            yield base
            yield from ((*base, alias.name) for alias in node.names)


def upward(edges: Edges) -> list[str]:
    """The imports that go up."""
    return [
        f"{place} imports {other}"
        for place in sorted(edges)
        for other in sorted(edges[place])
        if (here := floor(place)) is not None
        and (there := floor(other)) is not None
        and there > here
    ]


def circles(edges: Edges) -> list[list[str]]:
    """The sets of modules that import each other, on whatever way around."""
    reached = {place: _reached(place, edges) for place in edges}
    rings = {
        tuple(sorted(other for other in reached[place] if place in reached.get(other, ())))
        for place in edges
        if place in reached[place]
    }
    return [list(ring) for ring in sorted(rings)]


def _reached(place: str, edges: Edges) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges[place])
    while waiting:
        at = waiting.pop()
        if at not in seen:
            seen.add(at)
            waiting += edges.get(at, ())
    return seen


def homeless(root: Path) -> list[str]:
    """Modules that stand on no floor."""
    return sorted(place for place in places(root) if floor(place) is None)


@pytest.fixture(scope="module")
def edges() -> Edges:
    """The imports of this repository."""
    return imports(ROOT)


def test_there_is_no_circle(edges: Edges) -> None:
    assert circles(edges) == []


def test_nothing_imports_upward(edges: Edges) -> None:
    assert upward(edges) == []


def test_every_wing_has_a_floor() -> None:
    assert homeless(ROOT) == []


def test_every_floor_is_there() -> None:
    assert [folder for folder in FLOOR_OF if not any((ROOT / folder).rglob("*.py"))] == []


def test_the_sources_are_read(edges: Edges) -> None:
    assert edges[PACKAGE] >= {"engine/export", "engine/compile/optimize", GROUND}
    assert "engine/networks/unet" in edges["engine/networks/checkpoint"]
    assert "engine/cli/drawing" in edges["engine/cli/sample"]  # inside a function
    assert "kernels/philox" in edges["engine/sampling/latents"]  # from stepfuse.kernels import ...


def house(root: Path, sources: dict[str, str]) -> Path:
    """A small repository: names of files without their ending, and what is in them."""
    for name, text in sources.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# how engine/compile/trace may import its neighbour engine/compile/graph
NEIGHBOUR = [
    "import stepfuse.engine.compile.graph",
    "import os, stepfuse.engine.compile.graph as graph",
    "from stepfuse.engine.compile import graph",
    "from stepfuse.engine.compile.graph import Graph",
    "from stepfuse.engine.compile.graph import *",
    "from . import graph as g",
    "from .graph import Graph",
    "from ..compile import graph",
    "from ...engine.compile.graph import Graph",
    "def late():\n    from stepfuse.engine.compile.graph import Graph",
    "class Late:\n    async def late(self):\n        from .graph import Graph",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .graph import Graph",
    "try:\n    from . import graph\nexcept ImportError:\n    graph = None",
]


@pytest.mark.parametrize("statement", NEIGHBOUR)
def test_a_circle_is_found(statement: str, tmp_path: Path) -> None:
    back = "from stepfuse.engine.compile import runs"
    onward = "from stepfuse.engine.compile.trace import Trace"
    root = house(
        tmp_path,
        {
            "engine/compile/trace": statement,
            "engine/compile/graph": back,
            "engine/compile/runs": onward,
            "engine/compile/heap": onward,
        },
    )
    ring = ["engine/compile/graph", "engine/compile/runs", "engine/compile/trace"]
    assert circles(imports(root)) == [ring]
    assert upward(imports(root)) == []


def test_two_circles_are_two(tmp_path: Path) -> None:
    root = house(
        tmp_path,
        {
            "kernels/a": "from stepfuse.kernels import b",
            "kernels/b": "from stepfuse.kernels import a",
            "bench/c": "from stepfuse.bench import d\nfrom stepfuse.kernels import a",
            "bench/d": "from stepfuse.bench import c",
        },
    )
    assert circles(imports(root)) == [["bench/c", "bench/d"], ["kernels/a", "kernels/b"]]


@pytest.mark.parametrize(
    "statement", ["from stepfuse.engine.adapters import NAME", "from . import NAME"]
)
def test_a_package_and_its_module_are_a_circle(statement: str, tmp_path: Path) -> None:
    package = "from stepfuse.engine.adapters import patch"
    root = house(
        tmp_path, {"engine/adapters/__init__": package, "engine/adapters/patch": statement}
    )
    assert circles(imports(root)) == [["engine/adapters", "engine/adapters/patch"]]


# how kernels/attend may import from engine/training/loop: three floors up
UP = [
    "import stepfuse.engine.training.loop",
    "from stepfuse.engine.training.loop import train",
    "from stepfuse.engine.training import loop",
    "from stepfuse.engine import training",
    "from ..engine.training import loop",
    "from ..engine import training",
    "def late():\n    import stepfuse.engine.training.loop as loop",
    "from typing import TYPE_CHECKING as T\nif T:\n    from ..engine.training.loop import train",
]


@pytest.mark.parametrize("statement", UP)
def test_an_upward_import_is_found(statement: str, tmp_path: Path) -> None:
    root = house(tmp_path, {"kernels/attend": statement, "engine/training/loop": ""})
    found = upward(imports(root))
    assert found
    assert all(line.startswith("kernels/attend imports engine/training") for line in found)
    assert circles(imports(root)) == []


@pytest.mark.parametrize("statement", ["import stepfuse as sf", "from stepfuse import Sampler"])
def test_the_package_itself_is_the_roof(statement: str, tmp_path: Path) -> None:
    root = house(
        tmp_path,
        {
            "src/stepfuse/__init__": "from stepfuse._version import __version__",
            "src/stepfuse/_version": "__version__ = '1'",
            "engine/networks/unet": statement,
            "engine/networks/adm": "from stepfuse._version import __version__",
            "bench/loops": statement,
        },
    )
    assert upward(imports(root)) == [f"engine/networks/unet imports {PACKAGE}"]


def test_what_stands_well_is_not_named(tmp_path: Path) -> None:
    root = house(
        tmp_path,
        {
            "kernels/attend": "import torch\nfrom kernels import other",
            "kernels/triton/attend": "from stepfuse.kernels import attend",
            "engine/compile/passes/__init__": "from stepfuse.kernels.triton import attend",
            "engine/sampling/sampler": "from ..compile import passes\nfrom .latents import noise",
            "engine/sampling/latents": "import stepfuse.kernels.attend",
            "engine/cli/__init__": "from stepfuse.engine.sampling import sampler",
            "bench/loops": "from stepfuse.engine import cli",
        },
    )
    assert (circles(imports(root)), upward(imports(root)), homeless(root)) == ([], [], [])


def test_a_new_wing_needs_a_floor(tmp_path: Path) -> None:
    root = house(tmp_path, {"engine/serving/queue": "", "engine/loose": ""})
    assert homeless(root) == ["engine/loose", "engine/serving/queue"]
