"""The repository's shape: every op has its homes, files stay short, nothing is shadowed."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from torch.fx import GraphModule

from stepfuse.engine.compile.graph import PassContext, PassReport
from stepfuse.engine.compile.pass_order import PASSES

ROOT = Path(__file__).parent.parent
LONGEST = 400  # lines
FOLDERS = ("csrc", "kernels", "engine", "bench", "tests", "src", "scripts")
SUFFIXES = {".py", ".cpp", ".h", ".md", ".sh"}

# The reference defines what an op is. Philox is one like the others.
OPS = sorted(path.stem for path in (ROOT / "kernels" / "reference").glob("[!_]*.py"))


def sources() -> list[Path]:
    """The files that people write."""
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*")]
    return [
        path
        for path in found
        if path.suffix in SUFFIXES and "__pycache__" not in path.parts and path.is_file()
    ]


def test_the_ops_are_known() -> None:
    assert OPS == ["add_noise", "denoise_step", "group_norm_silu", "philox"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "home",
    [
        "kernels/{op}.py",
        "kernels/triton/{op}.py",
        "kernels/cpp/{op}.py",
        "csrc/{op}*",
        "tests/kernels/test_{op}.py",
        "bench/bench_{op}.py",
    ],
)
def test_every_op_has_a_home_everywhere(op: str, home: str) -> None:
    assert list(ROOT.glob(home.format(op=op))), home.format(op=op)


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources()
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_the_package_is_links_to_the_folders() -> None:
    package = ROOT / "src" / "stepfuse"
    for name in ("kernels", "engine", "bench"):
        assert (package / name).resolve() == ROOT / name


def test_kernels_is_not_a_package_of_its_own() -> None:
    """A package named ``kernels`` on PyPI is imported by diffusers and transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "engine" / "__init__.py").exists()
    assert not (ROOT / "bench" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "engine", "bench"])
def test_a_package_elsewhere_is_not_shadowed(name: str, tmp_path: Path) -> None:
    """Even from the repository's root, which Python searches first, theirs is imported."""
    theirs = tmp_path / name
    theirs.mkdir()
    (theirs / "__init__.py").write_text("OWNER = 'someone else'\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import stepfuse, {name};"
        f"print({name}.OWNER)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "someone else"


@pytest.mark.parametrize("op", OPS)
def test_the_repository_path_is_the_import_path(op: str) -> None:
    module = importlib.import_module(f"stepfuse.kernels.{op}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / "kernels" / f"{op}.py"


PASS_FILES = sorted(path.stem for path in (ROOT / "engine/compile/passes").glob("[!_]*.py"))


def test_the_list_has_every_pass_once_and_nothing_else() -> None:
    assert sorted(pass_.__name__ for pass_ in PASSES) == PASS_FILES


@pytest.mark.parametrize("name", PASS_FILES)
def test_a_file_of_passes_has_the_pass_of_its_name(name: str) -> None:
    module = importlib.import_module(f"stepfuse.engine.compile.passes.{name}")
    assert getattr(module, name) in PASSES
    found = inspect.signature(getattr(module, name), eval_str=True)
    parameters = [(p.name, p.annotation) for p in found.parameters.values()]
    assert parameters == [("gm", GraphModule), ("context", PassContext)]
    assert found.return_annotation is PassReport


def test_passes_are_imported_by_their_list_alone_and_know_nothing_of_networks() -> None:
    """But for what one of them says of its own work to another."""
    passes, compiling = "stepfuse.engine.compile.passes", "stepfuse.engine.compile"
    above = {f"{compiling}.{name}" for name in ("pass_order", "rewrite", "network", "compiled")}
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if path.suffix != ".py" or name.startswith("tests/"):
            continue
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        read = {node.module or "" for node in tree if isinstance(node, ast.ImportFrom)}
        if name.startswith("engine/compile/passes/"):
            assert not read & above, name
        elif name != "engine/compile/pass_order.py":
            assert not [module for module in read if module.startswith(passes)], name
