"""Run the heavy operators in bfloat16 (or float16), everything small in float32.

    conv(x, w) ──► conv(to(x, bf16), to(w, bf16))      likewise linear, matmul, attention

Casts of weights are folded, those of activations vanish between two heavy operators, since what
lies between them is computed in the dtype it gets. GroupNorm reads half-precision activations but
keeps float32 statistics, weights, and time embeddings. Vectors [N, C] (time and class embeddings)
stay float32 altogether: they are cheap, and every block depends on them. Error: that of rounding
activations and weights to 8 bits (bfloat16), relative 2^-9 each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from stepfuse.engine.passes.fuse_group_norm_silu import OP as GROUP_NORM
from stepfuse.engine.passes.graph import (
    PassReport,
    aten,
    call,
    calls,
    infer,
    is_tensor,
    stage,
    value,
)

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv_transpose2d.input,
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
Pays = Callable[[Node, torch.dtype], bool]


def lower_precision(gm: GraphModule, dtype: torch.dtype, pays: Pays) -> PassReport:
    """Cast what heavy operators read; ``pays(convolution, dtype)`` may keep one in float32."""
    report = PassReport("lower_precision")
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    wanted = [value(n).dtype for n in gm.graph.output_node().all_input_nodes]
    fused = calls(gm, GROUP_NORM)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or stage(node) != "main":
            continue
        heavy = node.target in _CONVOLUTIONS or node.target in _PRODUCTS
        if heavy and _activation(node).dim() > 2:
            keep = node.target in _CONVOLUTIONS and not pays(node, dtype)
            report.count("float32 is as fast for their shape" if keep else "")
            _cast_inputs(gm, node, torch.float32 if keep else dtype, casts)
        elif heavy:
            report.count("vectors [N, C]")
            _cast_inputs(gm, node, torch.float32, casts)
        elif node.target is GROUP_NORM:
            report.count()
        infer(node)
    output = gm.graph.output_node()
    for result, original in zip(output.all_input_nodes, wanted, strict=True):
        if value(result).dtype != original:
            with gm.graph.inserting_before(output):
                back = call(gm.graph, aten.to.dtype, result, original)
            output.replace_input_with(result, back)
    report.note = f"{dtype}; statistics of {len(fused)} GroupNorms in float32"
    return report


def _activation(node: Node) -> torch.Tensor:
    """What a heavy operator is applied to: the input of largest rank that is no weight."""
    inputs = [n for n in node.all_input_nodes if is_tensor(n) and stage(n) != "weights"]
    return max((value(n) for n in inputs), key=torch.Tensor.dim)


def _cast_inputs(
    gm: GraphModule, node: Node, dtype: torch.dtype, casts: dict[tuple[Node, torch.dtype], Node]
) -> None:
    for source in node.all_input_nodes:
        if not is_tensor(source) or not value(source).is_floating_point():
            continue
        if value(source).dtype in (dtype, torch.float64):
            continue
        if (source, dtype) not in casts:
            with gm.graph.inserting_before(_after_inputs(gm, source)):
                casts[source, dtype] = call(gm.graph, aten.to.dtype, source, dtype)
            casts[source, dtype].meta["stage"] = stage(source)
        node.replace_input_with(source, casts[source, dtype])


def _after_inputs(gm: GraphModule, source: Node) -> Node:
    """The first place where ``source`` is known, below all placeholders."""
    following = source.next
    while following.op == "placeholder":
        following = following.next
    return following
