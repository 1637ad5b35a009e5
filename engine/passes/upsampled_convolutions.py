"""Upsample and convolve in one product with fewer multiplications.

    conv3x3(nearest2x(x), w) = conv_transpose4x4(x, [1 1; 1 1] * flip(w)), stride 2

In an enlarged image every 2x2 pixels are equal, so that the nine weights meet at most four values:
their sums can be taken once, before anything runs. The figure, for one axis and w = (a, b, c):

    pixel 2i      a x[i-1] + (b + c) x[i]         4 sums (c, b + c, a + b, a), each used for
    pixel 2i + 1  (a + b) x[i] + c x[i+1]         every second pixel: a transposed convolution

16 products for a 2x2 patch of the result instead of 36, and the enlarged image is never written.
Zeros beyond the border stay zeros. Exact up to the order of summation (float32: relative 1e-6); the
sums of weights are taken in float64. Measured once per shape; CPU tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from stepfuse.engine.passes.graph import (
    PassReport,
    aten,
    calls,
    finish,
    is_call,
    only_user,
    replace,
    stage,
    value,
)
from stepfuse.engine.passes.heap import trim
from stepfuse.engine.passes.prepack_convolutions import convolution_arguments, mkldnn
from stepfuse.engine.passes.stopwatch import best_times, exceed_cache, trial

_UPSAMPLE = aten.upsample_nearest2d.vec
_ZEROS, _ONES, _TWOS = [0, 0], [1, 1], [2, 2]
_REPEATS = 5
# one axis of [1 1; 1 1] * flip(w): row p of the 4x4 weight sums these rows of w
_SUMS = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)


def upsampled_convolutions(gm: GraphModule) -> PassReport:
    """Rewrite every 3x3 convolution of an image that was enlarged twice, where it is faster."""
    report = PassReport("upsampled_convolutions")
    cold = exceed_cache(gm)
    for upsample in calls(gm, _UPSAMPLE):
        conv = only_user(upsample)
        problem = _problem(upsample, conv)
        if report.count(problem or _slower(upsample, conv, cold)):
            assert conv is not None
            _rewrite(gm, upsample, conv)
    finish(gm)
    return report


def summed(weight: Tensor) -> Tensor:
    """[1 1; 1 1] * flip(w) for w [K, C, 3, 3]: [C, K, 4, 4], as conv_transpose2d takes it."""
    s = _SUMS.to(weight.device)
    wide = torch.einsum("pi,qj,kcij->ckpq", s, s, weight.double())
    return wide.to(weight.dtype).contiguous()


def _problem(upsample: Node, conv: Node | None) -> str:
    if conv is None or not is_call(conv, aten.conv2d.default) or conv.args[0] is not upsample:
        return "not read by one convolution alone"
    x, out = _source(upsample), value(upsample)
    if list(out.shape[2:]) != [2 * size for size in x.shape[2:]]:
        return "not enlarged twice"
    _, weight, bias, stride, padding, dilation, groups = convolution_arguments(conv)
    if tuple(value(weight).shape[2:]) != (3, 3) or (stride, padding, dilation) != (_ONES,) * 3:
        return "not 3x3 with stride 1 and padding 1"
    if groups != 1:
        return "channels in groups"
    if any(isinstance(n, Node) and stage(n) != "weights" for n in (weight, bias)):
        return "the weight is computed from the inputs"
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "not on a CPU with oneDNN"
    if {x.dtype, value(weight).dtype} != {torch.float32}:
        return "not float32"
    return ""


def _slower(upsample: Node, conv: Node | None, cold: bool) -> str:
    assert conv is not None
    shape, channels_out = tuple(_source(upsample).shape), value(conv).shape[1]
    direct, merged = _seconds(shape, channels_out, cold, torch.get_num_threads())
    return "" if merged < direct else "the direct convolution is faster"


def _source(upsample: Node) -> Tensor:
    source = upsample.args[0]
    assert isinstance(source, Node)
    return value(source)


def _rewrite(gm: GraphModule, upsample: Node, conv: Node) -> None:
    _, weight, bias, *_ = convolution_arguments(conv)
    with gm.graph.inserting_before(conv):
        wide = gm.graph.call_function(summed, (weight,))
        merged = gm.graph.call_function(
            aten.conv_transpose2d.input,
            # stride, padding, padding of the output, groups, dilation
            (upsample.args[0], wide, bias, _TWOS, _ONES, _ZEROS, 1, _ONES),
        )
    channels_out, channels = value(weight).shape[:2]
    wide.meta["val"] = value(weight).new_empty(channels, channels_out, 4, 4)
    wide.meta["stage"] = "weights"
    merged.meta["val"] = conv.meta["val"]
    replace(conv, merged)


@trial
def _seconds(
    shape: tuple[int, ...], channels_out: int, cold: bool, threads: int
) -> tuple[float, float]:
    """(enlarged and convolved, merged) in float32; ``threads`` only tells results apart."""
    x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(channels_out, shape[1], 3, 3)
    twice = [*shape[:2], 2 * shape[2], 2 * shape[3]]
    direct = mkldnn._reorder_convolution_weight(weight, _ONES, _ONES, _ONES, 1, twice)
    geometry = (_ONES, _ZEROS, _TWOS, _ONES, 1)  # padding, of the output, stride, dilation, groups
    del weight
    trim()
    wide = torch.zeros(shape[1], channels_out, 4, 4)  # `summed(weight)`, of any value
    merged = mkldnn._reorder_convolution_transpose_weight(wide, *geometry, list(shape))
    del wide
    trim()
    plain: tuple[Any, ...] = ("none", [], "")

    def enlarged() -> Tensor:
        large = _UPSAMPLE(x, None, [2.0, 2.0])
        y: Tensor = mkldnn._convolution_pointwise(
            large, direct, None, _ONES, _ONES, _ONES, 1, *plain
        )
        return y

    def transposed() -> Tensor:
        y: Tensor = mkldnn._convolution_transpose_pointwise(x, merged, None, *geometry, *plain)
        return y

    first, second = best_times([enlarged, transposed], _REPEATS, warm=x if cold else None)
    return first, second
