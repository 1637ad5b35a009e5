"""A graph without torch.export: recorded once on tensors without data.

torch.export takes more than a network of plain tensor functions needs: 28 MB more for the network
of 35.7M parameters, half of them for imports that nothing here uses, and two thirds of a second. So
whatever is a straight line of functional operators on inputs and weights is recorded here, and
everything else is left to torch.export.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.state.random_sources import RandomSources
from stepfuse.engine.compile.tracing.quiet import quietly
from stepfuse.kernels.torch_names import FakeTensorMode, OpOverload, pytree, use_lazy_graph_module

_PLAIN = (Tensor, nn.Parameter)
_SCALARS = (bool, int, float, str, type(None))
Recorded = tuple[GraphModule, list[Node], pytree.TreeSpec, frozenset[str]]


class ChangesItself(RuntimeError):
    """The forward writes to its module at every call, which a graph would not do; ``paths``, as in
    `PythonState`, name what it writes.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = frozenset(paths)
        super().__init__(f"forward changes {min(self.paths)!r} at every call")


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded | None:
    """(graph, its inputs, how its results are put together, what the forward keeps); None where
    torch.export is needed.

    ``model`` is a mirror: it is left in any state. ``meta["weight"]`` names the weight that a
    placeholder stands for. None for subclasses of tensors, constants made on the way, operators
    that write to an argument, for whatever fails, and so for control flow on values.

    What a forward builds at its first call and finds at the second is a cache: the graph builds it
    at every call. Raises `ChangesItself` where the second call writes again.
    """
    if use_lazy_graph_module is None:  # this PyTorch has no such name
        return None
    call = _Call(model, args, kwargs, FakeTensorMode())
    leaves = call.leaves
    if any(type(tensor) not in _PLAIN for tensor in call.tensors):
        return None
    if not all(isinstance(leaf, (Tensor, *_SCALARS)) for leaf in leaves):
        return None
    state = PythonState({"model": model}, training=False)
    sources = RandomSources(state)
    try:
        fakes = call.fakes()
        # nobody runs the graph's own code, so that it is not written
        with quietly(), call.mode, use_lazy_graph_module(True):
            gm = make_fx(call, pre_dispatch=True)(*fakes)
    except Exception:  # torch.export says it better, if it fails too
        return None
    written = frozenset(state.changes())
    if drawn := sources.drawn():
        raise ChangesItself(written | drawn)
    nodes = list(gm.graph.nodes)
    if written:
        kept = _check_again(call, fakes, written)
        if kept and any(_is_random(node) for node in nodes):
            raise ChangesItself(written)  # what was drawn once must not be drawn again
    if not all(isinstance(leaf, (Tensor, *_SCALARS)) for leaf in call.results):
        return None
    if not all(_is_functional(node) for node in nodes):
        return None
    placeholders = [node for node in nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, call.names, strict=False):
        node.meta["weight"] = name
    inputs = _with_scalars(gm, leaves, placeholders[len(call.names) :])
    return gm, inputs, call.out_spec, written


def written_by(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """What the forward of a mirror builds at its first call and keeps, as far as it runs on tensors
    without data. Raises `ChangesItself` where the second call writes again.
    """
    call = _Call(model, args, kwargs, FakeTensorMode(allow_non_fake_inputs=True))
    state = PythonState({"model": model}, training=False)
    sources = RandomSources(state)
    try:
        fakes = call.fakes()
        with call.mode:
            call(*fakes)
    except Exception:  # whoever traces it says why
        if drawn := sources.drawn():
            raise ChangesItself(drawn) from None
        return frozenset()
    written = frozenset(state.changes())
    if drawn := sources.drawn():
        raise ChangesItself(written | drawn)
    if written:
        _check_again(call, fakes, written)
    return written


class _Call:
    """One call of a mirror, as a function of its weights and of the tensors among the arguments."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode
    ) -> None:
        weights = dict([*model.named_parameters(), *model.named_buffers()])
        self.model, self.mode, self.names = model, mode, list(weights)
        self.leaves, self._spec = pytree.tree_flatten((args, kwargs))
        given = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.tensors = (*weights.values(), *given)
        self.results: list[Any] = []
        self.out_spec: Any = None

    def fakes(self) -> list[Tensor]:
        """What stands for the tensors."""
        return [self.mode.from_tensor(tensor) for tensor in self.tensors]

    def __call__(self, *fakes: Tensor) -> tuple[Any, ...]:
        given = iter(fakes[len(self.names) :])
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        positional, named = pytree.tree_unflatten(filled, self._spec)
        held = dict(zip(self.names, fakes, strict=False))
        made = torch.func.functional_call(self.model, held, positional, named, tie_weights=True)
        self.results, self.out_spec = pytree.tree_flatten(made)
        return tuple(self.results)


def _check_again(call: _Call, fakes: list[Tensor], written: frozenset[str]) -> bool:
    """Whether the first call has left tensors in the module.

    Raises `ChangesItself` where a second one writes to it, too.
    """
    state = PythonState({"model": call.model}, training=False)
    try:
        with call.mode:
            call(*fakes)
    except Exception:
        raise ChangesItself(written) from None
    again = frozenset(state.changes())
    if again:
        raise ChangesItself(written | again)
    return state.has_fakes()


def _is_random(node: Node) -> bool:
    """Whether it draws numbers; dropout is off, here and in attention."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return not any(word in str(node.target) for word in ("dropout", "attention"))


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
