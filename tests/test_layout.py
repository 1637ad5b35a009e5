"""The repository's shape: every op has its homes, files stay short, nothing is shadowed."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from stepfuse.engine.compile.graph import PassContext, PassReport
from stepfuse.engine.compile.pass_order import PASSES
from stepfuse.kernels import registration

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


def modules(*patterns: str) -> Iterator[str]:
    """The names under which the files are imported."""
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield f"stepfuse.{name.removesuffix('.__init__')}"


def operators() -> dict[str, registration.Operator]:
    """Our operators by name, once everything is imported that may define one of them.

    What stands for something else than a computation of ours has a namespace of its own.
    """
    for module in modules("kernels/*.py", "engine/compile/**/*.py", "engine/replay/*.py"):
        importlib.import_module(module)
    names = {target.name().split("::")[1]: target for target in registration.OPERATORS
             if target.namespace == registration.NAMESPACE}  # fmt: skip
    return {name: registration.OPERATORS[target] for name, target in names.items()}


def owner(operator: str) -> str:
    """The op that an operator belongs to: of its name, or with _out, _backward and the like."""
    return next((op for op in OPS if operator == op or operator.startswith(f"{op}_")), "")


def strays(homes: Mapping[str, str]) -> dict[str, str]:
    """Of operators and the modules that define them, those that no op's own file defines."""
    return {
        operator: module
        for operator, module in homes.items()
        if not owner(operator) or module != f"stepfuse.kernels.{owner(operator)}"
    }


def test_every_operator_is_defined_by_an_op() -> None:
    """As many as PyTorch knows of in our namespace, and one at least for every op."""
    found = {name: operator.module for name, operator in operators().items()}
    assert strays(found) == {}
    assert {owner(name) for name in found} == set(OPS)
    registered = torch._C._dispatch_get_all_op_names()
    prefix = f"{registration.NAMESPACE}::"
    assert {name.removeprefix(prefix) for name in registered if name.startswith(prefix)} == {*found}


def test_an_operator_of_a_pass_has_no_home() -> None:
    passes, home = f"{PASSES[0].__module__}_2", "stepfuse.kernels.convolve"
    assert strays({"shuffle": passes, "convolve": home, "convolve_out": home}) == {
        "shuffle": passes
    }
    assert strays({"convolve_shuffled": passes}) == {"convolve_shuffled": passes}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "home",
    [
        "kernels/{op}.py",
        "kernels/cpp/{op}.py",
        "csrc/{op}*",
        "tests/kernels/test_{op}.py",
        "bench/bench_{op}.py",
    ],
)
def test_every_op_has_a_home_everywhere(op: str, home: str) -> None:
    assert list(ROOT.glob(home.format(op=op))), home.format(op=op)


@pytest.mark.parametrize("op", OPS)
def test_what_takes_cuda_tensors_has_a_home_with_triton(op: str) -> None:
    own = [known for name, known in operators().items() if owner(name) == op]
    on_cuda = any("CUDA" in known.devices for known in own)
    assert (ROOT / "kernels" / "triton" / f"{op}.py").exists() == on_cuda


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources()
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_every_module_of_the_engine_lives_in_a_wing() -> None:
    assert sorted(path.name for path in (ROOT / "engine").glob("*.py")) == []


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
    """Nor of each other: what two of them need is in `layers` or `graph`."""
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
        if name != "engine/compile/pass_order.py":
            assert not [module for module in read if module.startswith(passes)], name
