"""Convolutions and linear layers of a graph: their arguments, and in what form they could run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stepfuse.engine.compile.graph import aten, is_call, is_tensor, only_user, value
from stepfuse.engine.compile.runs import runs
from stepfuse.kernels.convolve import OP as CONVOLVE
from stepfuse.kernels.convolve import ConvolveCall
from stepfuse.kernels.filters import Form, fits
from stepfuse.kernels.group_norm_silu import OP as GROUP_NORM
from stepfuse.kernels.group_norm_silu import GroupNormCall

mkldnn = torch.ops.mkldnn
_BACKENDS = ("auto", "cpp")  # of a norm that a convolution may take along
ALONE: tuple[Any, ...] = ("none", [], "")  # of oneDNN's operators: with nothing before or after
_DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1))
_GEOMETRIES: dict[tuple[int, ...], tuple[Form, ...]] = {  # (kernel, stride, padding)
    (1, 1, 0): ("dense",),
    (3, 1, 1): ("direct", "lines", "squares"),
    (3, 2, 1): ("direct",),
}


def convolution_arguments(node: Node) -> tuple[Any, ...]:
    """(x, weight, bias, stride, padding, dilation, groups) of a conv2d, with two entries each."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    pairs = (pair(given.get(name, default)) for name, default in _DEFAULTS)
    return (given["input"], given["weight"], given.get("bias"), *pairs, given.get("groups", 1))


def pair(v: int | list[int]) -> list[int]:
    """A size for both dimensions, however it was written."""
    both = [v, v] if isinstance(v, int) else list(v)
    return both * 2 if len(both) == 1 else both


def operands(node: Node) -> list[Tensor]:
    """What stands for x and the weight."""
    return [value(n) for n in node.args[:2] if isinstance(n, Node)]


def uncast(weight: Any) -> Any:
    """The weight as the model has it: filters are rounded after their transform, biases never."""
    return weight.args[0] if is_call(weight, aten.to.dtype) else weight


def geometry(node: Node) -> tuple[int, ...] | None:
    """(kernel, stride, padding) of a convolution or linear layer where some form is for it."""
    if node.target is aten.linear.default:
        return (1, 1, 0) if value(node).dim() == 3 else None
    _, weight, _, stride, padding, dilation, groups = convolution_arguments(node)
    sizes = {*zip(value(weight).shape[2:], stride, padding, dilation, strict=True)}
    if groups != 1 or len(sizes) != 1:
        return None
    *found, dilation = sizes.pop()
    return tuple(found) if dilation == 1 and tuple(found) in _GEOMETRIES else None


def possible_forms(node: Node) -> tuple[Form, ...]:
    """The forms of `convolve` that would do; the first is the one that rounds least."""
    x, weight = operands(node)
    shape = x.shape if x.dim() == 4 else x.transpose(1, 2).unsqueeze(-1).shape
    forms = _GEOMETRIES.get(geometry(node) or (), ())
    return tuple(form for form in forms if fits(shape, weight.shape[0], form))


def packs(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether oneDNN runs this convolution here with a packed weight; float32 it always does."""
    if x.dtype is torch.float32:
        return True
    sizes = (padding, stride, dilation, groups)
    return runs(mkldnn._reorder_convolution_weight, weight, *sizes, list(x.shape)) and runs(
        mkldnn._convolution_pointwise.default, x, weight, None, *sizes, *ALONE
    )


def packs_transposed(x: Tensor, weight: Tensor, *sizes: Any) -> bool:
    """`packs` for a transposed one: padding, padding of the output, stride, dilation, groups."""
    if x.dtype is torch.float32:
        return True
    packing = mkldnn._reorder_convolution_transpose_weight
    return runs(packing, weight, *sizes, list(x.shape)) and runs(
        mkldnn._convolution_transpose_pointwise, x, weight, None, *sizes, *ALONE
    )


def packs_linear(x: Tensor, weight: Tensor) -> bool:
    """`packs` for a linear layer."""
    if x.dtype is torch.float32:
        return True
    rows = x.shape[:-1].numel()
    return runs(mkldnn._reorder_linear_weight, weight, rows) and runs(
        mkldnn._linear_pointwise.default, x, weight, None, *ALONE
    )


def is_packed(node: object) -> bool:
    """A convolution or linear layer with a packed weight and no residual yet."""
    if not is_tensor(node) or not isinstance(node, Node):
        return False
    if node.target is CONVOLVE:
        return ConvolveCall.of(node.args).residual is None
    return node.target in (
        mkldnn._convolution_pointwise.default,
        mkldnn._linear_pointwise.default,
    )


def norm_before(node: Node) -> Node | None:
    """The GroupNorm that ``node`` alone reads, as an image or as tokens [N, H W, C]; else None."""
    norm, reader = node.args[0], node
    assert isinstance(norm, Node)
    tokens = value(norm).dim() == 3
    if tokens:
        if not swaps_last(norm) or only_user(norm) is not node:
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


def swaps_last(node: Node) -> bool:
    """Whether it turns [N, C, L] to [N, L, C]."""
    if is_call(node, aten.transpose.int):
        return {int(d) % 3 for d in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]
    return is_call(node, aten.permute.default) and list(node.args[1]) == [0, 2, 1]  # type: ignore[arg-type]
