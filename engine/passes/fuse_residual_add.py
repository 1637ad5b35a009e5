"""Add the residual while the convolution writes its result.

    conv(h) + x         conv writes, add reads twice and writes: 3 passes over the sum
    conv(h, add to x)   one

A sum nobody else reads may be written over x itself. Exact up to rounding: the sum is taken before
rounding to the activations' dtype, not after (bfloat16: one rounding less).
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from stepfuse.engine.passes.graph import (
    PassReport,
    aten,
    calls,
    finish,
    is_call,
    is_tensor,
    only_user,
    replace,
    stage,
    value,
)
from stepfuse.engine.passes.prepack_convolutions import is_packed, mkldnn

_OUT_OF_PLACE = mkldnn._convolution_pointwise.binary
_IN_PLACE = mkldnn._convolution_pointwise_.binary
_FRESH = (mkldnn._convolution_pointwise.default, _OUT_OF_PLACE)


def fuse_residual_add(gm: GraphModule) -> PassReport:
    """Give every packed convolution the sum that follows it, where nothing else reads it."""
    report = PassReport("fuse_residual_add")
    in_place = 0
    for total in calls(gm, aten.add.Tensor):
        a: Any
        b: Any
        a, b = total.args[:2]
        pairs = [(c, o) for c, o in ((a, b), (b, a)) if _is_residual(c, o)]
        if not pairs:
            continue
        # of two convolutions the later one adds: the other is there already
        pairs.sort(key=lambda pair: _position(gm, pair[0]), reverse=True)
        usable = [(c, o) for c, o in pairs if not _problem(total, c, o)]
        if report.count("" if usable else _problem(total, *pairs[0])):
            in_place += _fuse(gm, total, *usable[0])
    report.note = f"{in_place} in place"
    finish(gm)
    return report


def _is_residual(conv: Any, other: Any) -> bool:
    """A convolution and an image of the same shape."""
    return is_packed(conv) and is_tensor(other) and value(conv).shape == value(other).shape


def _problem(total: Node, conv: Node, other: Node) -> str:
    if only_user(conv) is not total or conv is other:
        return "the convolution's result is read elsewhere"
    if total.kwargs.get("alpha", 1) != 1:
        return "a scaled sum"
    if value(conv).dtype != value(other).dtype:
        return "different dtypes"
    if stage(other) != "main":
        return "the residual does not depend on x"
    return ""


def _position(gm: GraphModule, node: Node) -> int:
    return next(i for i, candidate in enumerate(gm.graph.nodes) if candidate is node)


def _fuse(gm: GraphModule, total: Node, conv: Node, other: Node) -> bool:
    """Rewrite; True where the sum is written over ``other``."""
    x, weight, bias, padding, stride, dilation, groups = conv.args[:7]
    geometry: tuple[Any, ...] = (
        weight,
        bias,
        padding,
        stride,
        dilation,
        groups,
        "add",
        1.0,
        None,
        [],
        None,
    )
    over = is_call(other, *_FRESH) and only_user(other) is total
    arguments = (other, x, *geometry) if over else (x, other, *geometry)
    with gm.graph.inserting_before(total):
        fused = gm.graph.call_function(_IN_PLACE if over else _OUT_OF_PLACE, arguments)
    fused.meta.update(val=total.meta["val"], stage="main")
    replace(total, fused)
    return over
