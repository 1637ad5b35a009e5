"""Compute 3x3 convolutions by Winograd's algorithm where that is faster.

    conv2d(x, w, b)             ──► winograd(x, G w G^T, b)
    conv2d(x, w, b) + residual  ──► winograd(x, G w G^T, b, residual)

A convolution that already runs at the processor's peak can only be beaten by fewer multiplications:
two thirds of them (lines) or four ninths (square), see `winograd`. Both and the direct convolution
are measured once per shape. A network larger than the caches reads its filters from memory, and
these are 4/3 and 16/9 as large; so it is measured with filters that are not in the cache.

Float32: relative error 1e-6 a layer, as before. Bfloat16 rounds once more: squares are kept to
images of at most 16 pixels a side, since in large ones, close to the result, rounding shows most
(the 35.7M network for CIFAR-10: 8.2e-3 direct, 9.6e-3 so, 10.3e-3 with squares everywhere).
"""

from __future__ import annotations

from collections.abc import Callable
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
    is_tensor,
    only_user,
    replace,
    stage,
    value,
)
from stepfuse.engine.passes.heap import trim
from stepfuse.engine.passes.prepack_convolutions import convolution_arguments, mkldnn
from stepfuse.engine.passes.stopwatch import best_times, exceed_cache, trial
from stepfuse.engine.passes.winograd import filters, fits, native, why_not, winograd

_REPEATS = 5
_MARGIN = 1.05  # of the direct convolution's time over the other: below, exactness is worth more
_SQUARE_IN_BFLOAT16 = 16  # pixels a side
_ENTRIES = {False: 12, True: 16}  # of the filter of a pair of channels, in lines and in squares


def winograd_convolutions(gm: GraphModule) -> PassReport:
    """Rewrite every 3x3 convolution of stride 1 that measures faster, with the sum that follows."""
    report = PassReport("winograd_convolutions")
    cold = exceed_cache(gm)
    squares = sums = 0
    for node in calls(gm, aten.conv2d.default):
        problem = _problem(node)
        square = None if problem else _fastest(node, cold)
        if report.count(problem or ("the direct convolution is faster" if square is None else "")):
            assert square is not None
            squares += square
            sums += _rewrite(gm, node, square)
    report.note = f"{squares} in squares, {sums} with a residual"
    finish(gm)
    return report


def _problem(node: Node) -> str:
    x, weight, bias, stride, padding, dilation, groups = convolution_arguments(node)
    ones = [1, 1]
    if tuple(value(weight).shape[2:]) != (3, 3) or (stride, padding, dilation) != (ones,) * 3:
        return "not 3x3 with stride 1 and padding 1"
    if value(x).device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "not on a CPU with oneDNN"
    if value(x).dtype != value(weight).dtype or why_not(value(x).dtype):
        return why_not(value(x).dtype) or "different dtypes"
    if groups != 1 or not fits(value(x).shape, value(weight).shape[0], square=False):
        return "an odd width, or channels in groups or not in whole vectors"
    if any(isinstance(n, Node) and stage(n) != "weights" for n in (weight, bias)):
        return "the weight is computed from the inputs"
    return ""


def _fastest(node: Node, cold: bool) -> bool | None:
    """True for squares, False for lines, None for the direct convolution."""
    x, weight = (value(n) for n in node.args[:2] if isinstance(n, Node))
    shape, channels_out = tuple(x.shape), weight.shape[0]
    threads = torch.get_num_threads()
    direct, lines, squares = _seconds(shape, channels_out, x.dtype, cold, threads)
    rounds = x.dtype is torch.bfloat16 and max(shape[2:]) > _SQUARE_IN_BFLOAT16
    if not fits(x.shape, channels_out, square=True) or rounds:
        squares = float("inf")
    if _MARGIN * min(lines, squares) >= direct:
        return None
    return squares < lines


def _rewrite(gm: GraphModule, node: Node, square: bool) -> bool:
    """True where the sum that follows went along."""
    x, weight, bias = convolution_arguments(node)[:3]
    dtype = value(weight).dtype
    total = only_user(node)
    residual = None if total is None else _residual(total, node)
    last = node if residual is None or total is None else total
    with gm.graph.inserting_before(last):
        transformed = gm.graph.call_function(filters, (_uncast(weight), square, dtype))
        transformed.meta.update(val=value(weight), stage="weights")  # only `winograd` reads it
        fused = gm.graph.call_function(winograd, (x, transformed, _uncast(bias), residual, square))
    fused.meta.update(val=value(last), stage="main")
    replace(last, fused)
    if last is not node:
        gm.graph.erase_node(node)
    return residual is not None


def _uncast(weight: Any) -> Any:
    """The weight as the model has it: filters are rounded after their transform, biases never."""
    return weight.args[0] if is_call(weight, aten.to.dtype) else weight


def _residual(total: Node, conv: Node) -> Node | None:
    """What is added to the convolution, where that is an image like its result."""
    if not is_call(total, aten.add.Tensor) or total.kwargs.get("alpha", 1) != 1:
        return None
    other = next((n for n in total.args[:2] if n is not conv), None)
    if not isinstance(other, Node) or not is_tensor(other) or stage(other) != "main":
        return None
    same = (value(other).shape, value(other).dtype) == (value(conv).shape, value(conv).dtype)
    return other if same and value(total).dtype == value(conv).dtype else None


@trial
def _seconds(
    shape: tuple[int, ...], channels_out: int, dtype: torch.dtype, cold: bool, threads: int
) -> tuple[float, float, float]:
    """(direct, lines, squares); ``threads`` only tells results apart."""
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(channels_out, shape[1], 3, 3, dtype=dtype)
    ones = [1, 1]
    direct = mkldnn._reorder_convolution_weight(weight, ones, ones, ones, 1, list(shape))
    del weight
    trim()
    convolution = mkldnn._convolution_pointwise.default
    runs: list[Callable[[], Tensor]] = [
        lambda: convolution(x, direct, None, ones, ones, ones, 1, "none", [], "")
    ]
    forms = [square for square in (False, True) if fits(x.shape, channels_out, square)]
    # filters of any value do, and both forms can have theirs in one memory
    most = max((_ENTRIES[square] for square in forms), default=0)
    memory = torch.zeros(channels_out * shape[1] * most, dtype=dtype)
    for square in forms:
        u = memory[: channels_out * shape[1] * _ENTRIES[square]]
        u = u.view(channels_out // native.winograd_wide, -1)
        runs.append(lambda u=u, s=square: winograd(x, u, None, None, s))  # type: ignore[misc]
    times = best_times(runs, _REPEATS, warm=x if cold else None)
    times += [float("inf")] * (3 - len(times))
    return times[0], times[1], times[2]
