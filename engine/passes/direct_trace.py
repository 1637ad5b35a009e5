"""A graph without torch.export: recorded once on tensors without data.

torch.export takes more than a network of plain tensor functions needs: 28 MB more for the network
of 35.7M parameters, half of them for imports that nothing here uses, and two thirds of a second. So
whatever is a straight line of functional operators on inputs and weights is recorded here, and
everything else is left to torch.export.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

_PLAIN = (Tensor, nn.Parameter)
_SCALARS = (bool, int, float, str, type(None))
Recorded = tuple[GraphModule, list[Node], pytree.TreeSpec]


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded | None:
    """(graph, its inputs, how its results are put together); None where torch.export is needed.

    ``meta["weight"]`` names the weight that a placeholder stands for. None for subclasses of
    tensors, constants made on the way, operators that write to an argument, modules that keep a
    tensor of the forward, for whatever fails, and so for control flow on values.
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

    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        fakes = [mode.from_tensor(tensor) for tensor in (*weights.values(), *tensors)]
        # nobody runs the graph's own code, so that it is not written
        with warnings.catch_warnings(), mode, _use_lazy_graph_module(True):
            warnings.simplefilter("ignore")
            gm = make_fx(forward, pre_dispatch=True)(*fakes)
    except Exception:  # torch.export says it better, if it fails too
        return None
    finally:
        kept = _restore(before)
    flat, out_spec = results
    nodes = list(gm.graph.nodes)
    if kept or not all(isinstance(leaf, (Tensor, *_SCALARS)) for leaf in flat):
        return None
    if not all(_is_functional(node) for node in nodes):
        return None
    placeholders = [node for node in nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=False):
        node.meta["weight"] = name
    return gm, _with_scalars(gm, leaves, placeholders[len(names) :]), out_spec


def _restore(before: list[tuple[nn.Module, dict[str, Any]]]) -> bool:
    """Undo assignments of tensors without data to attributes; whether there were any."""
    kept = False
    for module, held in before:
        for name, now in list(vars(module).items()):
            if now is held.get(name) or not _holds_fake(now):
                continue
            kept = True
            if name in held:
                module.__dict__[name] = held[name]
            else:
                del module.__dict__[name]
    return kept


def _holds_fake(kept: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(kept))


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
