"""Compute the linear layers of one input in one product.

    q = x Wq^T + bq, k = x Wk^T + bk, v = x Wv^T + bv ──► [q k v] = x [Wq; Wk; Wv]^T + [bq; bk; bv]

as in attention. The parts are views of the result. x is read, packed and normalised once, and one
large product fills the processor better than three small ones. Exact.
"""

from __future__ import annotations

import itertools

from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    finish,
    replace,
    stage,
    value,
)


def merge_linears(gm: GraphModule, context: PassContext) -> PassReport:
    """Merge linear layers on images or tokens that read the same; vectors [N, C] stay."""
    report = PassReport("merge_linears")
    together: dict[object, list[Node]] = {}
    for node in calls(gm, aten.linear.default):
        x, weight, bias = _arguments(node)
        if stage(node) != "main" or value(node).dim() < 3:
            continue
        if any(isinstance(n, Node) and stage(n) != "weights" for n in (weight, bias)):
            report.count("the weight is computed from the inputs")
        elif value(x).device.type != "cpu":
            report.count("not on the CPU")
        else:
            together.setdefault((x, bias is None), []).append(node)
    merged = 0
    for nodes in together.values():
        for _ in nodes:
            report.count("" if len(nodes) > 1 else "no other reads the same")
        if len(nodes) > 1:
            merged += 1
            _merge(gm, nodes)
    report.note = f"into {merged}"
    finish(gm)
    return report


def _arguments(node: Node) -> tuple[Node, Node, Node | None]:
    x, weight, *rest = node.args
    return x, weight, (rest[0] if rest else node.kwargs.get("bias"))  # type: ignore[return-value]


def _merge(gm: GraphModule, nodes: list[Node]) -> None:
    x, _, bias = _arguments(nodes[0])
    parts = [_arguments(node) for node in nodes]
    with gm.graph.inserting_before(nodes[0]):
        weight = call(gm.graph, aten.cat.default, [p[1] for p in parts])
        offset = None if bias is None else call(gm.graph, aten.cat.default, [p[2] for p in parts])
        whole = call(gm.graph, aten.linear.default, x, weight, offset)
        for made in (weight, offset):
            if made is not None:
                made.meta["stage"] = "weights"
        edges = [0, *itertools.accumulate(value(node).shape[-1] for node in nodes)]
        slices = [
            call(gm.graph, aten.slice.Tensor, whole, -1, begin, end)
            for begin, end in itertools.pairwise(edges)
        ]
    for node, part in zip(nodes, slices, strict=True):
        replace(node, part)
