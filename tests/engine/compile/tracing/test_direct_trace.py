"""The graph that is recorded directly is the one torch.export gives; the rest is left to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import distance, own, small
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepfuse.engine.compile.graph import PassContext
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.passes.remove_no_ops import remove_no_ops
from stepfuse.engine.compile.tracing import trace as tracing
from stepfuse.engine.compile.tracing.direct_trace import ChangesItself, record
from stepfuse.engine.compile.tracing.mirror import mirrored
from stepfuse.engine.compile.tracing.trace import Traced, trace

Model = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Mixed(nn.Module):
    """Scalars among the inputs, several results, a buffer, one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.rand(5), persistent=False)
        self.unused = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor, factor: float, other: Tensor | None = None, **more: Any) -> Any:
        y = self.b(self.a(x) * self.scale) * factor
        second = y if other is None else y + other
        return {"y": y, "parts": (more["shift"] - second, None, 3)}


def mixed() -> Model:
    return Mixed(), (torch.randn(2, 5), 0.5), {"other": None, "shift": torch.randn(2, 5)}


MODELS: list[Callable[[], Model]] = [
    lambda: (*small(), {}),
    lambda: (*small(scale_shift=True), {}),
    lambda: (*own(), {}),
    mixed,
]


def described(found: Traced, model: nn.Module) -> list[Any]:
    """Operators with their arguments, shapes, dtypes and strides; no names."""
    remove_no_ops(found.gm, PassContext())
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    names: dict[Any, Any] = {node: f"input {i}" for i, node in enumerate(found.inputs)}
    lines = []
    for node in found.gm.graph.nodes:
        if node in names:
            continue
        if node.op == "placeholder":
            names[node] = f"weight at {weights[node.meta['weight']].data_ptr()}"
        elif node.op == "output":
            leaves = pytree.tree_leaves(node.args[0], is_leaf=lambda v: v in names)
            lines.append([names.get(leaf, leaf) for leaf in leaves])
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: names[n])
            if "norm" in str(node.target):  # torch.export writes eps out, and turns cuDNN's off
                args = (*args, 1e-5)[:5]
            names[node] = f"value {len(lines)}"
            made = pytree.tree_leaves(node.meta["val"])
            shapes = [(tuple(v.shape), v.dtype, v.stride()) for v in made if isinstance(v, Tensor)]
            lines.append([node.target, str(args), str(kwargs), shapes])
    return lines


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_it_is_the_graph_of_torch_export(
    make: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args, kwargs = make()
    assert record(model, args, kwargs) is not None
    found = trace(model, args, kwargs)
    monkeypatch.setattr(tracing, "record", lambda *_: None)
    expected = trace(model, args, kwargs)
    assert described(found, model) == described(expected, model)
    assert found.out_spec == expected.out_spec
    assert (found.time is None) == (expected.time is None)


@torch.no_grad()
def test_scalars_and_several_results() -> None:
    model, args, kwargs = mixed()
    fast, exact = optimize(model, (*args, kwargs)), model(*args, **kwargs)
    found = fast(*args, **kwargs)
    assert found["parts"][1:] == (None, 3)
    assert distance(found["y"], exact["y"]) < 1e-6
    assert distance(found["parts"][0], exact["parts"][0]) < 1e-6


class Kept(nn.Module):
    """Keeps a tensor of its forward; in a list where ``hidden``."""

    last: Any = None

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        self.last = [y] if self.hidden else y
        return y + 1


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).add_(1)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0])


class Attribute(nn.Module):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(3)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Double(Tensor):
    """A subclass, whose operators may mean anything."""


LEFT = [Branch(), InPlace(), Constant(), Attribute()]


@pytest.mark.parametrize("model", LEFT, ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_the_rest_is_left_to_torch_export(model: nn.Module) -> None:
    x = torch.rand(2, 3)
    assert record(model, (x,), {}) is None
    assert torch.equal(optimize(model, (x,))(x), model(x))


@pytest.mark.parametrize("hidden", [False, True])
@torch.no_grad()
def test_a_forward_that_keeps_its_tensors_is_named(hidden: bool) -> None:
    model, x = Kept(hidden), torch.rand(2, 3)
    with pytest.raises(ChangesItself, match=r"changes 'model\.last' at every call"):
        record(mirrored(model), (x,), {})
    fast = optimize(model, (x,))
    assert model.last is None, "nothing without data stays in the module"
    assert torch.equal(fast(x), model(x))
    (kept,) = model.last if hidden else [model.last]
    assert torch.equal(kept, x * 2)


@torch.no_grad()
def test_subclasses_are_left_to_torch_export() -> None:
    x = torch.rand(2, 3)
    assert record(nn.Linear(3, 3), (x,), {}) is not None
    assert record(nn.Linear(3, 3), (x.as_subclass(Double),), {}) is None
    linear = nn.Linear(3, 3)
    linear.register_buffer("extra", x.as_subclass(Double))
    assert record(linear, (x,), {}) is None
