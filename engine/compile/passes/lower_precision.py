"""Run the heavy operators in bfloat16 (or float16), everything small in float32.

    conv(x, w) ──► conv(to(x, bf16), to(w, bf16))      likewise linear, matmul, attention

Casts of weights are folded, those of activations vanish between two heavy operators, since what
lies between them is computed in the dtype it gets. GroupNorm reads half-precision activations but
keeps float32 statistics, weights, and time embeddings. Vectors [N, C] (time and class embeddings)
stay float32 altogether: they are cheap, and every block depends on them. Error: that of rounding
activations and weights to 8 bits (bfloat16), relative 2^-9 each.

No operator is given what it cannot take. Each is asked once whether it runs here in the dtype
(`runs`): a heavy one that does not is left in float32, anything else gets its inputs cast back.
Operands that had one dtype have one again, float32 where they differ; a number (a tensor without
dimensions) follows the others. What draws random numbers, and operators of other libraries, get
the dtypes they always had. On a CPU without instructions for the dtype everything stays float32.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    infer,
    is_tensor,
    stage,
    value,
)
from stepfuse.engine.compile.runs import has_instructions, outcome
from stepfuse.kernels.group_norm_silu import OP as GROUP_NORM
from stepfuse.kernels.torch_names import pytree

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
_PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.addmm.default,
    aten.mm.default,
    aten.einsum.default,
    aten.scaled_dot_product_attention.default,
)
_MIXED = (  # made for float32 parameters beside images of lower precision
    GROUP_NORM,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.batch_norm.default,
)
_NAMESPACES = ("aten", "prims", "stepfuse")
_NAMED = 3  # layers of a kind that a report names


def lower_precision(gm: GraphModule, context: PassContext) -> PassReport:
    """Cast what heavy operators read; ``context.pays`` may keep a convolution in float32."""
    report, dtype = PassReport("lower_precision"), context.dtype
    if dtype is None:
        report.applies = False
        return report
    inputs = _Inputs(gm)
    refused: dict[str, list[str]] = {}
    lowered = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or stage(node) != "main":
            continue
        if node.target not in _CONVOLUTIONS and node.target not in _PRODUCTS:
            _settle(inputs, node, dtype)
            if node.target is GROUP_NORM and value(node).dtype is dtype:
                report.count()
            continue
        low = dict.fromkeys(_floating(node), dtype)
        if _activation(node).dim() <= 2:
            problem = "vectors [N, C]"
        elif not has_instructions(value(node).device, dtype):
            problem = f"no instructions for {dtype} on this CPU"
        elif not _takes(inputs, node, low, dtype):
            refused.setdefault(_name(node), []).append(_layer(node))
            problem = "refused"
        elif node.target in _CONVOLUTIONS and not context.pays(node, dtype):
            problem = "float32 is as fast for their shape"
        else:
            problem = ""
        if problem != "refused":
            report.count(problem)
        lowered += not problem
        inputs.cast(node, dict.fromkeys(low, torch.float32) if problem else low)
        infer(node)
    inputs.restore_outputs()
    for name, layers in refused.items():
        named = ", ".join(layers[:_NAMED]) + (", ..." if len(layers) > _NAMED else "")
        for _ in layers:
            report.count(f"{name} does not run in {dtype} here ({named})")
    norms = len(calls(gm, GROUP_NORM))
    report.note = (
        f"{dtype}; statistics of {norms} GroupNorms in float32"
        if lowered
        else f"no layer in {dtype}: the network runs in float32"
    )
    return report


class _Inputs:
    """What nodes read, in which dtype, and in which dtype they did before this pass."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._before = {node: node.meta.get("val") for node in gm.graph.nodes}
        self._casts: dict[tuple[Node, torch.dtype], Node] = {}
        self._uncast: dict[Node, Node] = {}
        output = gm.graph.output_node()
        self._results = [n for n in output.all_input_nodes if is_tensor(n)]

    def before(self, node: Node) -> Any:
        """What stood for the node's value."""
        return self._before[self._uncast.get(node, node)]

    def changed(self, node: Node) -> bool:
        """Whether the dtype of something that ``node`` reads is another now."""
        return any(_dtypes(n.meta.get("val")) != _dtypes(self.before(n)) for n in _inputs(node))

    def cast(self, node: Node, wanted: dict[Node, torch.dtype]) -> None:
        """Let ``node`` read these in these dtypes; a cast is made once."""
        for given, dtype in wanted.items():
            source = self._uncast.get(given, given)
            if value(given).dtype is not dtype:
                node.replace_input_with(given, self._as(source, dtype))

    def restore_outputs(self) -> None:
        """Results are of the dtypes they were."""
        output = self._gm.graph.output_node()
        for result in self._results:
            dtype = self.before(result).dtype
            if value(result).dtype != dtype:
                with self._gm.graph.inserting_before(output):
                    back = call(self._gm.graph, aten.to.dtype, result, dtype)
                output.replace_input_with(result, back)

    def _as(self, source: Node, dtype: torch.dtype) -> Node:
        if value(source).dtype is dtype:
            return source
        if (source, dtype) not in self._casts:
            with self._gm.graph.inserting_before(_after_inputs(source)):
                made = call(self._gm.graph, aten.to.dtype, source, dtype)
            made.meta["stage"] = stage(source)
            self._casts[source, dtype], self._uncast[made] = made, source
        return self._casts[source, dtype]


def _settle(inputs: _Inputs, node: Node, dtype: torch.dtype) -> None:
    """Let an operator that is not heavy read what it can, of what is before it now."""
    if not inputs.changed(node):
        return
    if node.target is operator.getitem:
        infer(node)
        return
    alike = {} if node.target in _MIXED else _made_alike(inputs, node)
    if _is_ours_to_lower(node) and _takes(inputs, node, alike, dtype):
        made = outcome(node.target, *_arguments(node, alike))
        inputs.cast(node, alike)
        infer(node)
        if [kind for _, kind in made or ()] == _dtypes(node.meta["val"]):
            return
    inputs.cast(node, {n: inputs.before(n).dtype for n in _inputs(node) if is_tensor(n)})
    infer(node)


def _made_alike(inputs: _Inputs, node: Node) -> dict[Node, torch.dtype]:
    """Dtypes for operands that had one dtype and have several now."""
    together: dict[torch.dtype, list[Node]] = {}
    for source in _floating(node):
        together.setdefault(inputs.before(source).dtype, []).append(source)
    wanted: dict[Node, torch.dtype] = {}
    for before, sources in together.items():
        kinds = {value(n).dtype for n in sources}
        if len(kinds) > 1:
            images = {value(n).dtype for n in sources if value(n).dim() > 0}
            common = images.pop() if len(images) == 1 else before
            wanted.update(dict.fromkeys(sources, common))
    return wanted


def _is_ours_to_lower(node: Node) -> bool:
    """Not of other libraries, which may take for granted what they are given; nor random, where
    another dtype means other numbers; nor writing to its arguments.
    """
    target: Any = node.target
    if getattr(target, "namespace", "") not in _NAMESPACES or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _takes(
    inputs: _Inputs, node: Node, wanted: dict[Node, torch.dtype], dtype: torch.dtype
) -> bool:
    """Whether it runs on such inputs, and makes what it made but for ``dtype``."""
    made = outcome(node.target, *_arguments(node, wanted))
    before = [leaf for leaf in pytree.tree_leaves(inputs.before(node)) if _is_value(leaf)]
    if made is None or len(made) != len(before):
        return False
    return all(
        shape == old.shape
        and (kind == old.dtype or (old.is_floating_point() and kind in (dtype, torch.float32)))
        for (shape, kind), old in zip(made, before, strict=True)
    )


def _arguments(
    node: Node, wanted: dict[Node, torch.dtype]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What stands for the node's arguments, some of them cast."""

    def stand_in(source: Node) -> Any:
        held = source.meta["val"]
        return held.to(wanted[source]) if source in wanted else held

    with torch.no_grad():
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), stand_in)
    return args, kwargs


def _activation(node: Node) -> Tensor:
    """What a heavy operator is applied to: the input of largest rank that is no weight."""
    held = [n for n in node.all_input_nodes if is_tensor(n) and stage(n) != "weights"]
    return max((value(n) for n in held), key=Tensor.dim)


def _inputs(node: Node) -> list[Node]:
    return node.all_input_nodes


def _floating(node: Node) -> list[Node]:
    """The inputs whose precision may be chosen."""
    tensors = [n for n in node.all_input_nodes if is_tensor(n)]
    chosen = (torch.float32, torch.bfloat16, torch.float16)
    return [n for n in tensors if value(n).dtype in chosen]


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _dtypes(made: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def _name(node: Node) -> str:
    """conv2d, of aten.conv2d.default."""
    return str(node.target).split(".")[-2]


def _layer(node: Node) -> str:
    """The module whose weight a heavy operator reads, or what the graph calls its result."""
    sources: Iterable[Node] = node.all_input_nodes
    while held := [n for n in sources if stage(n) == "weights"]:
        named = [n.meta["weight"] for n in held if "weight" in n.meta]
        if named:
            return str(named[0]).rpartition(".")[0] or str(named[0])
        sources = [n for one in held for n in one.all_input_nodes]
    return node.name


def _after_inputs(source: Node) -> Node:
    """The first place where ``source`` is known, below all placeholders."""
    following = source.next
    while following.op == "placeholder":
        following = following.next
    return following
