"""What the passes share: what they are told, reports, matching and building nodes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from stepfuse.kernels.torch_names import FakeTensor, FakeTensorMode, tree_leaves

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class PassContext:
    """What a pass may go by beside the graph.

    Attributes:
        time: the placeholder of the timestep; None where there is none.
        dtype: of convolutions, linear layers and attention; None for the model's own.
        plain: whether constants must take no more memory than the weights they are made of.
        pays: whether a convolution is worth computing in ``dtype`` on this machine.
    """

    time: Node | None = None
    dtype: torch.dtype | None = None
    plain: bool = False
    pays: Callable[[Node, torch.dtype], bool] = field(default_factory=lambda: lambda *_: True)


@dataclass
class PassReport:
    """What a pass did, a line of `Optimized.explain`.

    Attributes:
        name: that of the pass.
        matched, candidates: how many places were rewritten, of how many that came into question.
        left: how many were not, by reason.
        note: what else there is to say.
        applies: False where the pass is not for such a network: nothing is said of it then.
    """

    name: str
    matched: int = 0
    candidates: int = 0
    left: Counter[str] = field(default_factory=Counter)
    note: str = ""
    applies: bool = True

    def count(self, problem: str = "") -> bool:
        """Count one candidate, left where there is a ``problem``; True where there is none."""
        self.candidates += 1
        if problem:
            self.left[problem] += 1
        else:
            self.matched += 1
        return not problem

    def __str__(self) -> str:
        line = f"{self.name:<22} {self.matched} of {self.candidates}"
        if self.note:
            line += f"; {self.note}"
        return line + "".join(f"; {n} left: {why}" for why, n in sorted(self.left.items()))


class Pass(Protocol):
    """Rewrites a graph in place, and says what it did; known by the name of the function."""

    __name__: str

    def __call__(self, gm: GraphModule, context: PassContext, /) -> PassReport: ...


def is_call(node: object, *targets: Any) -> bool:
    """True for a call of one of these operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value(node: Node) -> Tensor:
    """The fake tensor that stands for what the node computes."""
    val = node.meta["val"]
    assert isinstance(val, Tensor), f"{node} does not compute a tensor"
    return val


def is_tensor(node: object) -> bool:
    """True for a node that computes one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def only_user(node: Node) -> Node | None:
    """The one node that reads this one, None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def stage(node: Node) -> str:
    """When the node runs; everything is "main" until `stages.assign` says otherwise."""
    return str(node.meta.get("stage", "main"))


def call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call at the graph's insert point, its ``val`` computed from those of its arguments."""
    node = graph.call_function(target, args, kwargs)
    infer(node)
    return node


def infer(node: Node) -> None:
    """Compute ``val`` by running the node's operator on the ``val`` of its arguments."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = fake_mode(args, kwargs)
    with torch.no_grad():
        if mode is None:
            node.meta["val"] = _target(node)(*args, **kwargs)
        else:
            with mode:
                node.meta["val"] = _target(node)(*args, **kwargs)


def replace(old: Node, new: Node) -> None:
    """Let every reader of ``old`` read ``new``, and erase ``old``."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if not old.users:
        old.graph.erase_node(old)


def constant(node: object) -> float | None:
    """The number an argument is, None for a node or anything else."""
    return float(node) if isinstance(node, (int, float)) and not isinstance(node, bool) else None


def calls(gm: GraphModule, *targets: Any) -> list[Node]:
    """Every call of one of these operators, in order."""
    return [node for node in gm.graph.nodes if is_call(node, *targets)]


def finish(gm: GraphModule) -> None:
    """Drop what nobody reads; operators that write to an argument are kept."""
    gm.graph.eliminate_dead_code(_is_impure)


def _is_impure(node: Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return node.target not in _PURE if schema is None else bool(schema.is_mutable)


_PURE = (operator.getitem,)


def _target(node: Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def fake_mode(*trees: Any) -> FakeTensorMode | None:
    """The mode of the first tensor without data among the leaves, None where there is none."""
    for leaf in tree_leaves(trees):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return None
