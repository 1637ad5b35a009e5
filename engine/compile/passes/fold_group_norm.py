"""Normalise while a convolution or linear layer reads its image.

    conv(silu(norm(x)))     norm reads x twice and writes, conv reads: 4 passes over the image
    conv(x, norm, silu)     2: statistics, then pixels on their way into the products

The normalised image is never written, and in bfloat16 never rounded: there it is more exact by the
rounding that is saved. In float32 nothing changes but the order of operations (relative 1e-6). Only
`convolve` takes a norm along, and only one whose result nothing else reads.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    finish,
    value,
)
from stepfuse.engine.compile.layers import norm_before, swaps_last
from stepfuse.kernels.convolve import OP as CONVOLVE
from stepfuse.kernels.convolve import ConvolveCall
from stepfuse.kernels.group_norm_silu import OP as GROUP_NORM
from stepfuse.kernels.group_norm_silu import GroupNormCall


def fold_group_norm(gm: GraphModule, context: PassContext) -> PassReport:
    """Let every `convolve` take the GroupNorm before it along."""
    report = PassReport("fold_group_norm")
    norms = {norm_before(node): node for node in calls(gm, CONVOLVE)}
    for norm in calls(gm, GROUP_NORM):
        if report.count("" if norm in norms else _reason(norm)):
            _fold(gm, norm, norms[norm])
    finish(gm)
    return report


def _reason(norm: Node) -> str:
    if len(norm.users) > 1:
        return "its result is read more than once"
    return "not read by a convolution in a form of ours"


def _fold(gm: GraphModule, norm: Node, node: Node) -> None:
    found = GroupNormCall.of(norm.args)
    source = found.x
    if value(node).dim() == 3 and swaps_last(source):
        source = source.args[0]  # turned twice
    elif value(node).dim() == 3:
        with gm.graph.inserting_before(node):
            source = call(gm.graph, aten.transpose.int, source, 1, 2)
    node.args = replace(
        ConvolveCall.of(node.args),
        x=source,
        groups=found.groups,
        eps=found.eps,
        weight=found.weight,
        offset=found.bias,
        scale=found.scale,
        shift=found.shift,
        add=found.add,
        silu=found.silu,
    ).arguments()
