"""PyTorch's private names stand in one file, and are there or done without."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.compile.tracing import direct_trace, this_thread, unnoticed
from stepfuse.engine.compile.weights import parked
from stepfuse.kernels import torch_names
from stepfuse.kernels.torch_names import NAMES, OPTIONAL, find

ROOT = Path(__file__).parents[2]
HOME = "kernels/torch_names.py"
PRIVATE = re.compile(r"(^|\.)_[a-zA-Z]")
ROOTS = ("torch", "nn", "F", "Tensor")
LISTED = [(module, name) for module, names in NAMES.items() for name in names]


def private_names(source: str) -> Iterator[str]:
    """What a file imports, reads or spells out of PyTorch that begins with an underscore.

    Arguments of `find` are not meant: it refuses what it does not list.
    """
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    sought = {id(a) for call in calls if ast.unparse(call.func).endswith("find") for a in call.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if _is_private(a.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if _is_private(f"{node.module}.{alias.name}")
            )
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", dotted) and _is_private(dotted):
                yield dotted
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            spelt = re.fullmatch(r"torch(\.\w+)+", node.value)
            if spelt and _is_private(node.value) and id(node) not in sought:
                yield node.value


def _is_private(dotted: str) -> bool:
    top, _, rest = dotted.partition(".")
    return top in ROOTS and PRIVATE.search(rest) is not None


def test_no_other_file_reads_them() -> None:
    paths = [path for top in ("engine", "kernels", "bench") for path in (ROOT / top).rglob("*.py")]
    found = {
        path.relative_to(ROOT).as_posix(): sorted(names)
        for path in paths
        if (names := set(private_names(path.read_text(encoding="utf-8"))))
    }
    assert set(found) == {HOME}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("from torch.utils import _pytree as pytree", "torch.utils._pytree"),
        ("torch._C._nn._parse_to(x)", "torch._C._nn._parse_to"),
        ("nn.modules.batchnorm._NormBase", "nn.modules.batchnorm._NormBase"),
        ("importlib.import_module('torch._inductor.config')", "torch._inductor.config"),
    ],
)
def test_the_search_finds_them(source: str, name: str) -> None:
    assert name in set(private_names(source))


@pytest.mark.parametrize(
    "source",
    ["x._version", "torch.__version__", "find('torch._dynamo', 'config')", "from torch import nn"],
)
def test_the_search_leaves_the_rest(source: str) -> None:
    assert not set(private_names(source))


@pytest.mark.parametrize(("module", "name"), LISTED)
def test_what_is_needed_is_here(module: str, name: str) -> None:
    assert find(module, name) is not None


def test_what_is_not_listed_is_not_looked_up() -> None:
    with pytest.raises(KeyError, match=r"torch\._C\._cuda_init is not among the names"):
        find("torch._C", "_cuda_init")


def test_one_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMES, "torch._C", ("_gone",))
    monkeypatch.setitem(NAMES, "torch._nowhere", ("thing",))
    for module, name in (("torch._C", "_gone"), ("torch._nowhere", "thing")):
        with pytest.raises(ImportError, match=rf"has no {module}\.{name}.*known in 2\.6\.0, "):
            torch_names._needed(module, name)


def test_the_optional_ones_say_what_is_done_without_them() -> None:
    assert all(words for names in OPTIONAL.values() for words in names.values())
    assert not {(m, n) for m, names in OPTIONAL.items() for n in names} & set(LISTED)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.conv(x) * t.view(-1, 1, 1, 1)
        return result


def test_a_graph_without_direct_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export takes over, and traces without what it exchanges elsewhere."""
    monkeypatch.setattr(direct_trace, "use_lazy_graph_module", None)
    for module in (this_thread, unnoticed):
        monkeypatch.setattr(module.torch_names, "find", lambda *_: None)
    model, x, t = Small(), torch.randn(2, 3, 8, 8), torch.tensor([2.0, 3.0])
    assert direct_trace.record(model, (x, t), {}) is None
    with torch.no_grad():
        expected = model(x, t)
        torch.testing.assert_close(sf.optimize(model, (x, t))(x, t), expected)


def test_without_a_count_of_users_no_weight_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(4)
    view = weight[:2]
    alone, shared = torch_names.storage_users(torch.ones(4)), torch_names.storage_users(weight)
    assert alone is not None
    assert shared == alone + 1
    assert not parked.is_alone(weight), view
    assert parked.is_alone(torch.ones(4))
    monkeypatch.setattr(torch_names, "_use_count", None)
    assert torch_names.storage_users(weight) is None
    assert not parked.is_alone(torch.ones(4))


@pytest.mark.parametrize("together", [True, False], ids=["of 2.11", "of 2.6"])
def test_versions_are_set_in_either_way(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch_names._set_version
    seen: list[Any] = []

    def one_at_a_time(tensor: Any, version: Any) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError("argument 't' must be Tensor, not tuple")
        seen.append(tensor)
        real((tensor,), (version,))

    if not together:
        monkeypatch.setattr(torch_names, "_set_version", one_at_a_time)
    tensors = [torch.zeros(2).add_(1), torch.zeros(3)]
    torch_names.set_versions(tensors, [5, 7])
    assert [tensor._version for tensor in tensors] == [5, 7]
    assert len(seen) == (0 if together else 2)
