"""A graph without torch.export: recorded once on tensors without data.

torch.export takes more than a network of plain tensor functions needs: 28 MB more for the network
of 35.7M parameters, half of them for imports that nothing here uses, and two thirds of a second. So
whatever is a straight line of functional operators on inputs and weights is recorded here, and
everything else is left to torch.export.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from stepfuse.engine.passes.python_state import PythonState

_PLAIN = (Tensor, nn.Parameter)
_SCALARS = (bool, int, float, str, type(None))
Recorded = tuple[GraphModule, list[Node], pytree.TreeSpec, frozenset[str]]


class ChangesItself(RuntimeError):
    """The forward writes to its module at every call, which a graph would not do."""

    def __init__(self, path: str) -> None:
        super().__init__(f"forward changes {path!r} at every call")


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded | None:
    """(graph, its inputs, how its results are put together, what the forward keeps); None where
    torch.export is needed.

    ``model`` is a mirror: it is left in any state. ``meta["weight"]`` names the weight that a
    placeholder stands for. None for subclasses of tensors, constants made on the way, operators
    that write to an argument, for whatever fails, and so for control flow on values.

    What a forward builds at its first call and finds at the second is a cache: the graph builds it
    at every call. Raises `ChangesItself` where the second call writes again.
    """
    weights = dict([*model.named_parameters(), *model.named_buffers()])
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(type(tensor) not in _PLAIN for tensor in (*weights.values(), *tensors)):
        return None
    if not all(isinstance(leaf, (Tensor, *_SCALARS)) for leaf in leaves):
        return None
    mode = FakeTensorMode()
    names = list(weights)
    results: list[Any] = []

    def forward(*fakes: Tensor) -> tuple[Any, ...]:
        given = iter(fakes[len(names) :])
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        positional, named = pytree.tree_unflatten(filled, spec)
        held = dict(zip(names, fakes, strict=False))
        made = torch.func.functional_call(model, held, positional, named, tie_weights=True)
        flat, out_spec = pytree.tree_flatten(made)
        results[:] = [flat, out_spec]
        return tuple(flat)

    state = PythonState({"model": model}, training=False)
    try:
        fakes = [mode.from_tensor(tensor) for tensor in (*weights.values(), *tensors)]
        # nobody runs the graph's own code, so that it is not written
        with warnings.catch_warnings(), mode, _use_lazy_graph_module(True):
            warnings.simplefilter("ignore")
            gm = make_fx(forward, pre_dispatch=True)(*fakes)
    except Exception:  # torch.export says it better, if it fails too
        return None
    flat, out_spec = results
    written = frozenset(state.changes())
    if written:
        _check_again(model, lambda: forward(*fakes), mode, min(written))
    nodes = list(gm.graph.nodes)
    if not all(isinstance(leaf, (Tensor, *_SCALARS)) for leaf in flat):
        return None
    if not all(_is_functional(node) for node in nodes):
        return None
    placeholders = [node for node in nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=False):
        node.meta["weight"] = name
    return gm, _with_scalars(gm, leaves, placeholders[len(names) :]), out_spec, written


def _check_again(
    model: nn.Module, call: Callable[[], Any], mode: FakeTensorMode, path: str
) -> None:
    """Raise `ChangesItself` where a second call writes to the module, as the first did at path."""
    state = PythonState({"model": model}, training=False)
    try:
        with mode:
            call()
    except Exception:
        raise ChangesItself(path) from None
    for changed in state.changes():
        raise ChangesItself(changed)


def _is_functional(node: Node) -> bool:
    if node.op in ("placeholder", "output") or node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and not node.target._schema.is_mutable


def _with_scalars(gm: GraphModule, leaves: list[Any], tensors: list[Node]) -> list[Node]:
    """A placeholder for every leaf: what is no tensor was recorded as its value."""
    given = iter(tensors)
    inputs: list[Node] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            inputs.append(next(given))
        else:
            with gm.graph.inserting_before(gm.graph.output_node()):
                inputs.append(gm.graph.placeholder(f"scalar_{i}"))
            inputs[-1].meta["val"] = leaf
    return inputs
