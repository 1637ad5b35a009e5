"""Bring convolution and linear weights into the order oneDNN computes with, once.

    conv2d(x, w, b) ──► _convolution_pointwise(x, packed(w), b)        conv_transpose2d likewise

Without it every call reorders its weights first. The packed weight is a "weights" node: computed
when the program is built and after `Optimized.refresh`. CPU tensors only. Exact up to the order of
summation (float32: relative 1e-5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
from stepfuse.engine.compile.layers import (
    ALONE,
    convolution_arguments,
    mkldnn,
    packs,
    packs_linear,
    packs_transposed,
    pair,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prepack_convolutions(gm: GraphModule, context: PassContext) -> PassReport:
    """Pack the weights of every 2-dimensional convolution and of every linear layer on images."""
    report = PassReport("prepack_convolutions")
    for node in calls(gm, aten.conv2d.default):
        if report.count(_problem(node)):
            _pack_convolution(gm, node)
    for node in calls(gm, aten.conv_transpose2d.input):
        if report.count(_problem(node)):
            _pack_transposed(gm, node)
    for node in calls(gm, aten.linear.default):
        x = node.args[0]
        assert isinstance(x, Node)
        # on vectors [N, C] oneDNN takes 12 us to start, a plain product 3
        if stage(node) == "main" and value(x).dim() > 2 and report.count(_problem(node)):
            _pack_linear(gm, node)
    finish(gm)
    return report


def _problem(node: Node) -> str:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this PyTorch has no oneDNN"
    x, weight = node.args[:2]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if value(x).device.type != "cpu":
        return "not on the CPU"
    if stage(weight) != "weights":
        return "the weight is computed from the inputs"
    if value(x).dtype not in DTYPES or value(x).dtype != value(weight).dtype:
        return f"{value(x).dtype} activations and {value(weight).dtype} weights"
    asked = _ASKED[node.target]
    return "" if asked(node) else f"oneDNN has none in {value(x).dtype} here"


def _convolution_packs(node: Node) -> bool:
    x, weight, _, *geometry = convolution_arguments(node)
    return packs(value(x), value(weight), *geometry)


def _transposed_packs(node: Node) -> bool:
    x, weight, _, *geometry = _transposed_arguments(node)
    return packs_transposed(value(x), value(weight), *geometry)


def _linear_packs(node: Node) -> bool:
    x, weight = node.args[:2]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    return packs_linear(value(x), value(weight))


_ASKED: dict[Any, Callable[[Node], bool]] = {
    aten.conv2d.default: _convolution_packs,
    aten.conv_transpose2d.input: _transposed_packs,
    aten.linear.default: _linear_packs,
}


def _pack_convolution(gm: GraphModule, node: Node) -> None:
    x, weight, bias, stride, padding, dilation, groups = convolution_arguments(node)
    with gm.graph.inserting_before(node):
        packed = gm.graph.call_function(
            mkldnn._reorder_convolution_weight.default,
            (weight, padding, stride, dilation, groups, list(value(x).shape)),
        )
        packed.meta["val"] = weight.meta["val"]  # opaque in memory, of the same shape
        fused = call(
            gm.graph,
            mkldnn._convolution_pointwise.default,
            *(x, packed, bias, padding, stride, dilation, groups, *ALONE),
        )
    replace(node, fused)


def _pack_transposed(gm: GraphModule, node: Node) -> None:
    x, weight, bias, *geometry = _transposed_arguments(node)
    with gm.graph.inserting_before(node):
        packed = gm.graph.call_function(
            mkldnn._reorder_convolution_transpose_weight.default,
            (weight, *geometry, list(value(x).shape)),
        )
        packed.meta["val"] = weight.meta["val"]
        fused = gm.graph.call_function(
            mkldnn._convolution_transpose_pointwise.default,
            (x, packed, bias, *geometry, *ALONE),
        )
        fused.meta["val"] = node.meta["val"]
    replace(node, fused)


def _transposed_arguments(node: Node) -> tuple[Any, ...]:
    """(x, weight, bias, padding, output_padding, stride, dilation, groups), two entries each."""
    given: dict[str, Any] = dict(zip(_TRANSPOSED, node.args, strict=False))
    given.update(node.kwargs)
    pairs = (pair(given.get(name, default)) for name, default in _TRANSPOSED_DEFAULTS)
    return (given["input"], given["weight"], given.get("bias"), *pairs, given.get("groups", 1))


_TRANSPOSED = (
    "input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation",
)  # fmt: skip
_TRANSPOSED_DEFAULTS = (("padding", 0), ("output_padding", 0), ("stride", 1), ("dilation", 1))


def _pack_linear(gm: GraphModule, node: Node) -> None:
    x, weight, *rest = node.args
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    bias = rest[0] if rest else node.kwargs.get("bias")
    rows = value(x).shape[:-1].numel()
    with gm.graph.inserting_before(node):
        packed = gm.graph.call_function(mkldnn._reorder_linear_weight.default, (weight, rows))
        packed.meta["val"] = weight.meta["val"]
        fused = gm.graph.call_function(mkldnn._linear_pointwise.default, (x, packed, bias, *ALONE))
        fused.meta["val"] = node.meta["val"]
    replace(node, fused)
