"""Upsample and convolve in one product with fewer multiplications.

    conv3x3(nearest2x(x), w) = conv_transpose4x4(x, [1 1; 1 1] * flip(w)), stride 2
                             = convolve(x, packed w, enlarged)

In an enlarged image every 2x2 pixels are equal, so that the nine weights meet at most four values:
their sums can be taken once, before anything runs. The figure, for one axis and w = (a, b, c):

    pixel 2i      a x[i-1] + (b + c) x[i]         4 sums (c, b + c, a + b, a), each used for
    pixel 2i + 1  (a + b) x[i] + c x[i+1]         every second pixel: a transposed convolution

16 products for a 2x2 patch of the result instead of 36, and the enlarged image is never written. A
pair of pixels shares (a + b + c) x[i], which leaves 9 of them: see `kernels/filters.py`. Zeros
beyond the border stay zeros. Exact up to the order of summation (float32: relative 1e-6); sums of
weights are taken in float64. All three are measured once per shape, the 16 products only where the
9 took more than 16/36 of the time of the 36; CPU tensors only.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
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
    replace,
    stage,
    value,
)
from stepfuse.engine.compile.heap import trim
from stepfuse.engine.compile.layers import (
    ALONE,
    convolution_arguments,
    mkldnn,
    packs,
    packs_transposed,
    uncast,
)
from stepfuse.engine.compile.stopwatch import (
    best_times,
    blank_filters,
    exceed_cache,
    scratch_operand,
    trial,
)
from stepfuse.kernels.convolve import OP as CONVOLVE
from stepfuse.kernels.convolve import CallSite, ConvolveCall
from stepfuse.kernels.filters import filters, fits
from stepfuse.kernels.products import why_not

_UPSAMPLE = aten.upsample_nearest2d.vec
_ZEROS, _ONES, _TWOS = [0, 0], [1, 1], [2, 2]
_AT_ONCE = (_ONES, _ZEROS, _TWOS, _ONES, 1)  # padding, of the output, stride, dilation, groups
_REPEATS = 5
# one axis of [1 1; 1 1] * flip(w): row p of the 4x4 weight sums these rows of w
_SUMS = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)


def upsampled_convolutions(gm: GraphModule, context: PassContext) -> PassReport:
    """Rewrite every 3x3 convolution of an image that was enlarged twice, where it is faster."""
    report = PassReport("upsampled_convolutions")
    cold, plain = exceed_cache(gm), context.plain
    taken: Counter[str] = Counter()
    for upsample in calls(gm, _UPSAMPLE):
        conv = _reader(upsample)
        problem = _problem(upsample, conv)
        form = None if problem or conv is None else _fastest(upsample, conv, cold, plain)
        if report.count(problem or ("" if form else "the direct convolution is faster")):
            assert conv is not None
            taken[form or ""] += 1
            if form == "enlarged":
                _enlarged(gm, upsample, conv, plain)
            else:
                _transposed(gm, upsample, conv)
    report.note = ", ".join(f"{count} {form}" for form, count in sorted(taken.items()))
    finish(gm)
    return report


def summed(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[1 1; 1 1] * flip(w) for w [K, C, 3, 3]: [C, K, 4, 4], as conv_transpose2d takes it."""
    s = _SUMS.to(weight.device)
    wide = torch.einsum("pi,qj,kcij->ckpq", s, s, weight.double())
    return wide.to(dtype or weight.dtype).contiguous()


def _reader(upsample: Node) -> Node | None:
    """The only node that reads the enlarged image, in whatever layout and dtype."""
    reader = only_user(upsample)
    while reader is not None and is_call(reader, aten.contiguous.default, aten.to.dtype):
        reader = only_user(reader)
    return reader


def _image(gm: GraphModule, upsample: Node, dtype: torch.dtype) -> Node:
    """What is enlarged, channels-last and in the dtype of the convolution."""
    image = upsample.args[0]
    assert isinstance(image, Node)
    if value(image).dtype != dtype:
        image = call(gm.graph, aten.to.dtype, image, dtype)
    return call(gm.graph, aten.contiguous.default, image, memory_format=torch.channels_last)


def _problem(upsample: Node, conv: Node | None) -> str:
    if conv is None or not is_call(conv, aten.conv2d.default):
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
    if value(weight).dtype not in (torch.float32, torch.bfloat16):
        return "neither float32 nor bfloat16"
    if not _both_run(value(upsample), value(weight), x):
        return f"oneDNN has none in {value(weight).dtype} here"
    return ""


def _both_run(enlarged: Tensor, weight: Tensor, x: Tensor) -> bool:
    """Whether oneDNN has the convolution of the enlarged image, and the transposed one."""
    dtype, (channels_out, channels) = weight.dtype, weight.shape[:2]
    wide = weight.new_empty(channels, channels_out, 4, 4)
    return packs(enlarged.to(dtype), weight, _ONES, _ONES, _ONES, 1) and packs_transposed(
        x.to(dtype), wide, *_AT_ONCE
    )


def _fastest(upsample: Node, conv: Node, cold: bool, plain: bool) -> str | None:
    """ "transposed" or "enlarged"; None for the convolution of the enlarged image."""
    x, channels_out, dtype = _source(upsample), value(conv).shape[1], value(conv).dtype
    threads = torch.get_num_threads()
    times = _seconds(tuple(x.shape), channels_out, dtype, plain, cold, threads)
    best = min(times)
    return ("transposed", "enlarged")[times.index(best) - 1] if best < times[0] else None


def _possible(x: Tensor, channels_out: int, dtype: torch.dtype) -> bool:
    return not why_not(dtype) and fits(x.shape, channels_out, "enlarged")


def _source(upsample: Node) -> Tensor:
    source = upsample.args[0]
    assert isinstance(source, Node)
    return value(source)


def _transposed(gm: GraphModule, upsample: Node, conv: Node) -> None:
    _, weight, bias, *_ = convolution_arguments(conv)
    with gm.graph.inserting_before(conv):
        image = _image(gm, upsample, value(weight).dtype)
        wide = gm.graph.call_function(summed, (uncast(weight), value(weight).dtype))
        merged = gm.graph.call_function(
            aten.conv_transpose2d.input,
            # stride, padding, padding of the output, groups, dilation
            (image, wide, bias, _TWOS, _ONES, _ZEROS, 1, _ONES),
        )
    channels_out, channels = value(weight).shape[:2]
    wide.meta["val"] = value(weight).new_empty(channels, channels_out, 4, 4)
    wide.meta["stage"] = "weights"
    merged.meta["val"] = conv.meta["val"]
    replace(conv, merged)


def _enlarged(gm: GraphModule, upsample: Node, conv: Node, plain: bool) -> None:
    _, weight, bias, *_ = convolution_arguments(conv)
    dtype = value(weight).dtype
    with gm.graph.inserting_before(conv):
        packed = gm.graph.call_function(filters, (uncast(weight), "enlarged", dtype, plain))
        packed.meta.update(val=value(weight), stage="weights")
        image = _image(gm, upsample, dtype)
        written = ConvolveCall(image, packed, uncast(bias), form="enlarged")
        merged = gm.graph.call_function(CONVOLVE, written.arguments())
    merged.meta.update(val=conv.meta["val"], stage="main")
    replace(conv, merged)


@trial
def _seconds(
    shape: tuple[int, ...],
    channels_out: int,
    dtype: torch.dtype,
    plain: bool,
    cold: bool,
    threads: int,
) -> tuple[float, float, float]:
    """(enlarged and convolved, transposed, in one); ``threads`` only tells results apart."""
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    warm = x if cold else None
    weight_shape = (channels_out, shape[1], 3, 3)
    runs = [_directly(x, weight_shape)]
    if _possible(x, channels_out, dtype):
        u = blank_filters(weight_shape, ("enlarged",), dtype, plain)["enlarged"]
        given = ConvolveCall(x, u, form="enlarged").arguments()
        runs.append(functools.partial(CallSite(), *given))
    direct, own = (*best_times(runs, _REPEATS, warm), float("inf"))[:2]
    if own < direct * 16 / 36:
        return direct, float("inf"), own  # a transposed one multiplies 16/36 as much as the direct
    del runs
    (transposed,) = best_times([_at_once(x, (shape[1], channels_out, 4, 4))], _REPEATS, warm)
    return direct, transposed, own


def _directly(x: Tensor, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """oneDNN's convolution of the enlarged image with some weight of this shape."""
    weight = scratch_operand(math.prod(shape), x.dtype).view(shape)
    twice = [*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]]
    packed = mkldnn._reorder_convolution_weight(weight, _ONES, _ONES, _ONES, 1, twice)
    trim()
    convolution = mkldnn._convolution_pointwise.default

    def run() -> Tensor:
        large = _UPSAMPLE(x, None, [2.0, 2.0])
        y: Tensor = convolution(large, packed, None, _ONES, _ONES, _ONES, 1, *ALONE)
        return y

    return run


def _at_once(x: Tensor, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """oneDNN's transposed convolution with some weight of this shape."""
    weight = scratch_operand(math.prod(shape), x.dtype).view(shape)
    packed = mkldnn._reorder_convolution_transpose_weight(weight, *_AT_ONCE, list(x.shape))
    trim()
    convolution = mkldnn._convolution_transpose_pointwise
    return lambda: convolution(x, packed, None, *_AT_ONCE, *ALONE)
