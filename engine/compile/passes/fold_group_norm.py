"""Normalise while a convolution or linear layer reads its image.

    conv(silu(norm(x)))     norm reads x twice and writes, conv reads: 4 passes over the image
    conv(x, norm, silu)     2: statistics, then pixels on their way into the products

The normalised image is never written, and in bfloat16 never rounded: there it is more exact by the
rounding that is saved. In float32 nothing changes but the order of operations (relative 1e-6). Only
`convolve` takes a norm along, and only one whose result nothing else reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    finish,
    is_call,
    only_user,
    value,
)
from stepfuse.kernels.convolve import OP as CONVOLVE
from stepfuse.kernels.convolve import ConvolveCall
from stepfuse.kernels.group_norm_silu import OP as GROUP_NORM
from stepfuse.kernels.group_norm_silu import GroupNormCall

_BACKENDS = ("auto", "cpp")


def fold_group_norm(gm: GraphModule, context: PassContext) -> PassReport:
    """Let every `convolve` take the GroupNorm before it along."""
    report = PassReport("fold_group_norm")
    norms = {norm_before(node): node for node in calls(gm, CONVOLVE)}
    for norm in calls(gm, GROUP_NORM):
        if report.count("" if norm in norms else _reason(norm)):
            _fold(gm, norm, norms[norm])
    finish(gm)
    return report


def norm_before(node: Node) -> Node | None:
    """The GroupNorm that ``node`` alone reads, as an image or as tokens [N, H W, C]; else None."""
    norm, reader = node.args[0], node
    assert isinstance(norm, Node)
    tokens = value(norm).dim() == 3
    if tokens:
        if not _swaps_last(norm) or only_user(norm) is not node:
            return None
        reader, norm = norm, norm.all_input_nodes[0]
    if not is_call(norm, GROUP_NORM) or only_user(norm) is not reader:
        return None
    found = GroupNormCall.of(norm.args)
    x = value(found.x)
    side_by_side = (
        x.transpose(1, 2).is_contiguous()
        if tokens
        else x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    same = x.dtype == value(norm).dtype and x.device.type == "cpu"
    return norm if side_by_side and same and found.backend in _BACKENDS else None


def _swaps_last(node: Node) -> bool:
    """Whether it turns [N, C, L] to [N, L, C]."""
    if is_call(node, aten.transpose.int):
        return {int(d) % 3 for d in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]
    return is_call(node, aten.permute.default) and list(node.args[1]) == [0, 2, 1]  # type: ignore[arg-type]


def _reason(norm: Node) -> str:
    if len(norm.users) > 1:
        return "its result is read more than once"
    return "not read by a convolution in a form of ours"


def _fold(gm: GraphModule, norm: Node, node: Node) -> None:
    found = GroupNormCall.of(norm.args)
    source = found.x
    if value(node).dim() == 3 and _swaps_last(source):
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
