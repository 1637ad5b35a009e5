"""Add the residual while a convolution or linear layer writes its result.

    conv(h) + x                     conv writes, add reads twice and writes: 3 passes over the sum
    conv(h, add to x)               one

    view(linear(h)) + x             tokens [N, H W, C] seen as an image, as after attention
    view(linear(h, add to view'(x)))

view being transpositions and reshapes, view' the way back, neither of which may copy. A sum nobody
else reads may be written over x itself (convolutions). Exact up to rounding: the sum is taken
before rounding to the activations' dtype, not after (bfloat16: one rounding less).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    finish,
    is_call,
    is_tensor,
    only_user,
    replace,
    stage,
    value,
)
from stepfuse.engine.compile.layers import is_packed, mkldnn
from stepfuse.engine.compile.runs import runs
from stepfuse.kernels.convolve import OP as CONVOLVE
from stepfuse.kernels.convolve import ConvolveCall

_CONVOLUTION = mkldnn._convolution_pointwise.default
_LINEAR = mkldnn._linear_pointwise.default
_OUT_OF_PLACE = mkldnn._convolution_pointwise.binary
_IN_PLACE = mkldnn._convolution_pointwise_.binary
_FRESH = (_CONVOLUTION, _OUT_OF_PLACE)
_SWAPS = (aten.transpose.int, aten.permute.default)
_RESHAPES = (
    aten.view.default, aten.reshape.default, aten.squeeze.dim, aten.unsqueeze.default,
    aten.flatten.using_ints, aten.contiguous.default,
)  # fmt: skip


@dataclass(frozen=True)
class _Sum:
    """``total`` = view(product) + other; ``views`` from the product to the sum."""

    total: Node
    product: Node
    views: tuple[Node, ...]
    other: Node

    @property
    def operand(self) -> Node:
        """What the sum reads of the product."""
        return self.views[-1] if self.views else self.product


def fuse_residual_add(gm: GraphModule, context: PassContext) -> PassReport:
    """Give every packed product the sum that follows it, where nothing else reads it."""
    report = PassReport("fuse_residual_add")
    in_place = 0
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    for total in calls(gm, aten.add.Tensor):
        a, b = total.args[:2]
        sums = [s for s in (_sum(total, a, b), _sum(total, b, a)) if s is not None]
        if not sums:
            continue
        # of two products the later one adds: the other is there already
        sums.sort(key=lambda s: places.get(s.product, 0), reverse=True)
        usable = [s for s in sums if not _problem(s)]
        if report.count("" if usable else _problem(sums[0])):
            in_place += _fuse(gm, usable[0])
    report.note = f"{in_place} in place"
    finish(gm)
    return report


def _sum(total: Node, operand: Any, other: Any) -> _Sum | None:
    """The sum if ``operand`` is a packed product, seen through views, and ``other`` an image."""
    if not is_tensor(operand) or not is_tensor(other):
        return None
    views: list[Node] = []
    node = operand
    while is_call(node, *_SWAPS, *_RESHAPES):
        views.insert(0, node)
        node = node.args[0]
    if not is_packed(node) or value(operand).shape != value(other).shape:
        return None
    return _Sum(total, node, tuple(views), other)


def _problem(s: _Sum) -> str:
    readers = zip((s.product, *s.views), (*s.views, s.total), strict=True)
    if any(only_user(node) is not reader for node, reader in readers) or s.operand is s.other:
        return "the product's result is read elsewhere"
    if s.total.kwargs.get("alpha", 1) != 1:
        return "a scaled sum"
    if value(s.product).dtype != value(s.other).dtype:
        return "different dtypes"
    if stage(s.other) != "main":
        return "the residual does not depend on x"
    if not _lies_alike(s):
        return "the residual lies in memory in another order"
    if not _runs(s):
        return f"oneDNN has no such sum in {value(s.product).dtype} here"
    return ""


def _runs(s: _Sum) -> bool:
    """Whether the operator that adds is there, in either form; in float32 it always is."""
    if s.product.target is CONVOLVE or value(s.product).dtype is torch.float32:
        return True
    for over in (False, True):
        target, arguments = _with_sum(s.product, s.product, over)
        if not runs(target, *map_arg(arguments, value)):
            return False
    return True


def _lies_alike(s: _Sum) -> bool:
    """Whether the residual can be seen as the product's result without a copy."""
    seen = value(s.other)
    try:
        for view in reversed(s.views):
            seen = _undone(view, seen, lambda x, shape: x.view(shape))
    except (RuntimeError, ValueError):  # which of the two depends on whether there is data
        return False
    if value(s.product).dim() == 3:
        return seen.is_contiguous()
    # convolutions take any layout and bring it into theirs, through views they should not have to
    return not s.views or seen.is_contiguous(memory_format=torch.channels_last)


def _undone(view: Node, x: Any, reshape: Any, permute: Any = Tensor.permute) -> Any:
    """x as it was before ``view``."""
    source = view.args[0]
    assert isinstance(source, Node)
    if view.target not in _SWAPS:
        return reshape(x, list(value(source).shape))
    order: list[Any] = list(range(value(source).dim()))
    if view.target is aten.transpose.int:
        i, j = (int(dim) for dim in view.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
        return permute(x, order)
    there: Any = view.args[1]
    return permute(x, [[int(d) % len(order) for d in there].index(i) for i in order])


def _fuse(gm: GraphModule, s: _Sum) -> bool:
    """Rewrite; True where the sum is written over the residual."""
    graph = gm.graph
    with graph.inserting_before(s.total):
        other = s.other
        for view in reversed(s.views):
            other = _undone(
                view,
                other,
                lambda x, shape: call(graph, aten.view.default, x, shape),
                lambda x, order: call(graph, aten.permute.default, x, order),
            )
        over = s.product.target in _FRESH and _is_free(other, s.total)
        target, arguments = _with_sum(s.product, other, over)
        result = graph.call_function(target, arguments)
        result.meta.update(val=s.product.meta["val"], stage="main")
        for view in s.views:
            result = call(graph, view.target, result, *view.args[1:], **view.kwargs)
    replace(s.total, result)
    return over


def _is_free(other: Node, total: Node) -> bool:
    """Whether the residual's memory is read by the sum alone, and no view of something else."""
    return is_call(other, *_FRESH) and only_user(other) is total


def _with_sum(product: Node, other: Node, over: bool) -> tuple[Any, tuple[Any, ...]]:
    """The operator that adds ``other``, and its arguments."""
    if product.target is CONVOLVE:
        added = dataclasses.replace(ConvolveCall.of(product.args), residual=other)
        return CONVOLVE, added.arguments()
    if product.target is _LINEAR:
        x, weight, bias = product.args[:3]
        return mkldnn._linear_pointwise.binary, (x, other, weight, bias, "add")
    x, *geometry = product.args[:7]
    sums = (*geometry, "add", 1.0, None, [], None)
    return (_IN_PLACE, (other, x, *sums)) if over else (_OUT_OF_PLACE, (x, other, *sums))
