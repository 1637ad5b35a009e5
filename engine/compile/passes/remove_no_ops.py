"""Remove what computes nothing.

    dropout(x, p, train=False) = x        x / 1 = x * 1 = x + 0 = x        x.to(dtype of x) = x
    assertions on metadata, aliases and detachments

Exact: the outputs keep every bit.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    calls,
    constant,
    finish,
    is_tensor,
    replace,
    value,
)

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_SCALINGS = (aten.div.Tensor, aten.mul.Tensor, aten.div.Scalar, aten.mul.Scalar)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)
_SAME = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar)


def remove_no_ops(gm: GraphModule, context: PassContext) -> PassReport:
    """Bypass every node whose result is its first argument; drop assertions."""
    report = PassReport("remove_no_ops")
    for node in calls(gm, *_DROPOUTS, *_SCALINGS, *_SUMS, *_CASTS, *_SAME):
        source = node.args[0]
        if not isinstance(source, Node) or not is_tensor(source):
            continue
        if _changes_nothing(node, source):
            report.count()
            replace(node, source)
        elif node.target in _DROPOUTS:
            report.count("dropout in training mode")
    for node in calls(gm, aten._assert_tensor_metadata.default, aten._assert_async.msg):
        report.count()
        gm.graph.erase_node(node)
    finish(gm)
    return report


def _changes_nothing(node: Node, source: Node) -> bool:
    if node.target in _SAME:
        return True
    before, after = value(source), value(node)
    if (before.dtype, before.shape, before.device) != (after.dtype, after.shape, after.device):
        return False
    if node.target in _DROPOUTS:
        return not node.args[2]
    if node.target in _SCALINGS:
        return constant(node.args[1]) == 1.0
    if node.target in _SUMS:
        return constant(node.args[1]) == 0.0
    return before.stride() == after.stride()
