"""Compute 3x3 convolutions by Winograd's algorithm where that is faster.

    conv2d(x, w, b) ──► winograd(x, packed(G w G^T), b)

A convolution that already runs at the processor's peak can only be beaten by fewer multiplications:
F(4x4, 3x3) needs a quarter of them, plus transforms of the tiles (`winograd`). Both are measured
once per shape; the tiles must win by a fifth, since their filters are four times as large and in a
network come from memory. Float32 on the CPU; relative error 3e-6 a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from stepfuse.engine.passes.graph import PassReport, aten, calls, finish, replace, stage, value
from stepfuse.engine.passes.prepack_convolutions import convolution_arguments, mkldnn
from stepfuse.engine.passes.stopwatch import best_times
from stepfuse.engine.passes.winograd import (
    FREQUENCIES,
    filters,
    offsets,
    packed_shape,
    winograd,
)

_REPEATS = 7
_MARGIN = 1.2  # of the direct convolution's time over that of the tiles
_LANES = 16  # channels in a vector register: others leave lanes empty


def winograd_convolutions(gm: GraphModule) -> PassReport:
    """Rewrite every 3x3 convolution of stride 1 that measures faster."""
    report = PassReport("winograd_convolutions")
    for node in calls(gm, aten.conv2d.default):
        problem = _problem(node)
        if report.count(problem or _slower(node)):
            _rewrite(gm, node)
    finish(gm)
    return report


def _problem(node: Node) -> str:
    x, weight, bias, stride, padding, dilation, groups = convolution_arguments(node)
    ones = [1, 1]
    if tuple(value(weight).shape[2:]) != (3, 3) or (stride, padding, dilation) != (ones,) * 3:
        return "not 3x3 with stride 1 and padding 1"
    if groups != 1 or any(channels % _LANES for channels in value(weight).shape[:2]):
        return "channels in groups or not in sixteens"
    if value(x).device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "not on a CPU with oneDNN"
    if {value(x).dtype, value(weight).dtype} != {torch.float32}:
        return "not float32"
    if any(isinstance(n, Node) and stage(n) != "weights" for n in (weight, bias)):
        return "the weight is computed from the inputs"
    return ""


def _slower(node: Node) -> str:
    x, weight = (value(n) for n in node.args[:2] if isinstance(n, Node))
    direct, tiled = _seconds(tuple(x.shape), weight.shape[0], torch.get_num_threads())
    return "" if _MARGIN * tiled < direct else "the direct convolution is faster"


def _rewrite(gm: GraphModule, node: Node) -> None:
    x, weight, bias = convolution_arguments(node)[:3]
    channels_out, channels = value(weight).shape[:2]
    shape = packed_shape(value(x).shape, channels)
    with gm.graph.inserting_before(node):
        transformed = gm.graph.call_function(filters, (weight,))
        packed = gm.graph.call_function(
            mkldnn._reorder_convolution_weight.default,
            (transformed, [0, 0], [1, 1], [1, 1], FREQUENCIES, shape),
        )
        placed = None if bias is None else gm.graph.call_function(offsets, (bias,))
        fused = gm.graph.call_function(winograd, (x, packed, placed, channels_out))
    for made in (transformed, packed, placed):
        if made is not None:
            made.meta["val"] = value(weight)  # only weights read it
    fused.meta["val"] = node.meta["val"]
    replace(node, fused)


@functools.cache
def _seconds(shape: tuple[int, ...], channels_out: int, threads: int) -> tuple[float, float]:
    """(direct, by tiles); ``threads`` only tells results apart."""
    x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(channels_out, shape[1], 3, 3)
    pack = mkldnn._reorder_convolution_weight.default
    ones = [1, 1]
    direct = pack(weight, ones, ones, ones, 1, list(shape))
    wanted = packed_shape(x.shape, shape[1])
    tiled = pack(filters(weight), [0, 0], ones, ones, FREQUENCIES, wanted)
    convolution = mkldnn._convolution_pointwise.default
    runs: list[Callable[[], Tensor]] = [
        lambda: convolution(x, direct, None, ones, ones, ones, 1, "none", [], ""),
        lambda: winograd(x, tiled, None, channels_out),
    ]
    first, second = best_times(runs, _REPEATS)
    return first, second
