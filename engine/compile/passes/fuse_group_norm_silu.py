"""Normalise, modulate and activate in one pass over the activation.

    add ──► group_norm ──► · (1 + scale) ──► + shift ──► silu        five passes
    x, add, scale, shift ──► group_norm_silu                          one

with add, scale and shift [N, C] (or [N, C, 1, 1] in the graph), each of them optional, and so is
the SiLU. A norm between casts, to(norm(to(x, float32)), bfloat16), becomes the operator on bfloat16
with its arithmetic in float32. A lone SiLU stays as it is. Statistics are float32 in either form;
results agree to 1e-5 of their norm in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    constant,
    finish,
    is_call,
    is_tensor,
    only_user,
    replace,
    value,
)
from stepfuse.kernels.group_norm_silu import OP, GroupNormCall, least_eps

_ADDS = (aten.add.Tensor,)
_MULS = (aten.mul.Tensor,)
_SILUS = (aten.silu.default,)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass
class _Match:
    """A GroupNorm with its surroundings; ``last`` is the node whose value is replaced.

    ``reader`` is the only one that may read x, for a sum before it to be taken in.
    """

    norm: Node
    x: Node
    last: Node
    reader: Node
    add: Node | None = None
    scale: Node | None = None
    shift: Node | None = None
    silu: bool = False


def fuse_group_norm_silu(gm: GraphModule, context: PassContext) -> PassReport:
    """Replace every GroupNorm and what belongs to it by one operator."""
    report = PassReport("fuse_group_norm_silu")
    counts = {"SiLU": 0, "scale-shift": 0, "add": 0}
    for norm in calls(gm, aten.group_norm.default):
        if not report.count(_problem(norm)):
            continue
        match = _match(norm)
        counts["SiLU"] += match.silu
        counts["scale-shift"] += match.scale is not None
        counts["add"] += match.add is not None
        _rewrite(gm, match)
    already = len(calls(gm, OP)) - report.matched
    parts = [f"{count} with {name}" for name, count in counts.items() if count]
    if already:
        parts.append(f"{already} written with the fused op")
    report.note = ", ".join(parts)
    finish(gm)
    return report


def _problem(norm: Node) -> str:
    x = norm.args[0]
    assert isinstance(x, Node)
    if value(x).dim() < 2 or not value(x).is_floating_point():
        return "not an image"
    if _norm_arguments(norm)[3] < least_eps(value(x).dtype):
        return "an eps that is 0 in float32"
    return ""


def _match(norm: Node) -> _Match:
    x = norm.args[0]
    assert isinstance(x, Node)
    match = _Match(norm, x, norm, norm)
    _take_casts(match)
    _take_add(match)
    _take_scale_shift(match)
    silu = only_user(match.last)
    if is_call(silu, *_SILUS):
        assert silu is not None
        match.silu, match.last = True, silu
    return match


def _take_casts(match: _Match) -> None:
    """norm of x in float32, and back to the dtype of x."""
    cast, back = match.x, only_user(match.norm)
    if not is_call(cast, aten.to.dtype) or not is_call(back, aten.to.dtype):
        return
    source = cast.args[0]
    assert isinstance(source, Node)
    assert back is not None
    if value(cast).dtype is torch.float32 and value(source).dtype == value(back).dtype in _HALVES:
        match.x, match.last, match.reader = source, back, cast


def _take_add(match: _Match) -> None:
    """norm(h + e) with e [N, C, 1, 1], where nobody else reads the sum."""
    total = match.x
    if not is_call(total, *_ADDS) or only_user(total) is not match.reader or _has_alpha(total):
        return
    for h, e in (total.args, total.args[::-1]):
        if isinstance(h, Node) and _is_per_channel(e, value(total)) and same_shape(h, total):
            assert isinstance(e, Node)
            match.x, match.add = h, e
            return


def _take_scale_shift(match: _Match) -> None:
    """norm * (1 + scale) + shift; the (1 + scale) may be written either way round."""
    product = only_user(match.last)
    if not is_call(product, *_MULS):
        return
    assert product is not None
    factor = _other(product, match.last)
    scale = _one_plus(factor)
    if scale is None or not _is_per_channel(scale, value(match.norm)):
        return
    total = only_user(product)
    if not is_call(total, *_ADDS) or _has_alpha(total):
        return
    assert total is not None
    shift = _other(total, product)
    if isinstance(shift, Node) and _is_per_channel(shift, value(match.norm)):
        match.scale, match.shift, match.last = scale, shift, total


def _one_plus(node: object) -> Node | None:
    """The s of s + 1 or 1 + s."""
    if not is_call(node, aten.add.Tensor, aten.add.Scalar) or _has_alpha(node):
        return None
    assert isinstance(node, Node)
    a, b = node.args[:2]
    if constant(b) == 1.0 and isinstance(a, Node):
        return a
    return b if constant(a) == 1.0 and isinstance(b, Node) else None


def _has_alpha(node: object) -> bool:
    assert isinstance(node, Node)
    return bool(node.kwargs.get("alpha", 1) != 1)


def _other(node: Node, one: Node) -> object:
    a, b = node.args
    return b if a is one else a


def _is_per_channel(node: object, image: torch.Tensor) -> bool:
    """[N, C, 1, ...] for an image [N, C, ...] with spatial dimensions."""
    if not isinstance(node, Node) or not is_tensor(node) or image.dim() < 3:
        return False
    wanted = (*image.shape[:2], *(1 for _ in image.shape[2:]))
    return bool(tuple(value(node).shape) == wanted)


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes compute tensors of one shape."""
    return is_tensor(a) and tuple(value(a).shape) == tuple(value(b).shape)


def _rewrite(gm: GraphModule, match: _Match) -> None:
    norm = match.norm
    groups, weight, bias, eps = _norm_arguments(norm)
    with gm.graph.inserting_before(match.last):
        scale, shift, add = (
            None if v is None else call(gm.graph, aten.flatten.using_ints, v, 1)
            for v in (match.scale, match.shift, match.add)
        )
        written = GroupNormCall(
            match.x, weight, bias, groups, eps, scale, shift, add, match.silu, "auto"
        )
        fused = call(gm.graph, OP, *written.arguments())
    replace(match.last, fused)


def _norm_arguments(norm: Node) -> tuple[int, Node | None, Node | None, float]:
    """(groups, weight, bias, eps) of a call of group_norm, with its defaults filled in."""
    given = dict(zip(("input", "groups", "weight", "bias", "eps"), norm.args, strict=False))
    given.update(norm.kwargs)
    return given["groups"], given.get("weight"), given.get("bias"), given.get("eps", 1e-5)  # type: ignore[return-value]
