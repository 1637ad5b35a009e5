"""Give convolutions and linear layers the form in which they are fastest here.

    conv2d(x, w, b)   ──► convolve(x, packed w, b, form)      1x1, or 3x3 with stride 1 or 2
    linear(x, w, b)   ──► convolve(x, packed w, b, dense)

A convolution that already runs at the processor's peak can only be beaten by fewer multiplications:
two thirds of them (lines) or four ninths (squares), see `convolve`. Small layers are bound by what
surrounds the products, large ones by reading their filters. So oneDNN and every form are measured
once per shape, with the GroupNorm before it where `fold_group_norm` will take that in. A network
larger than the caches reads its filters from memory, and some forms have larger ones; there it is
measured with filters that are not in the cache. oneDNN keeps the code it makes for a shape: where
it loses at the layer with most products and at the one with most weights for its image, it is not
asked about the others.

Float32: relative error 1e-6 a layer, as before. Bfloat16 rounds what it transforms: of images above
16 pixels a side squares are taken only after a norm that is folded, whose result then has not been
rounded before (the 35.7M network for CIFAR-10, relative L2: 8.4e-3 direct, 9.1e-3 with lines
everywhere, 9.9e-3 with squares, 10.4e-3 with squares of rounded images; eager bfloat16 10.2e-3).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    PassContext,
    PassReport,
    aten,
    calls,
    finish,
    replace,
    stage,
    value,
)
from stepfuse.engine.compile.heap import trim
from stepfuse.engine.compile.layers import (
    convolution_arguments,
    geometry,
    mkldnn,
    norm_before,
    operands,
    packs,
    packs_linear,
    possible_forms,
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
from stepfuse.kernels.filters import Form, filters
from stepfuse.kernels.group_norm_silu import GroupNormCall, group_norm_silu
from stepfuse.kernels.products import why_not

_REPEATS = 5
# how much faster oneDNN must be: its trial does not see that a norm is written, that images are
# concatenated and residuals added for it
_MARGIN = 1.25
_SQUARES_IN_BFLOAT16 = 16  # pixels a side


def convolution_forms(gm: GraphModule, context: PassContext) -> PassReport:
    """Rewrite every convolution and linear layer on images that oneDNN is not clearly faster at."""
    report = PassReport("convolution_forms")
    cold, plain = exceed_cache(gm), context.plain
    taken: Counter[Form] = Counter()
    layers = [
        node
        for node in calls(gm, aten.conv2d.default, aten.linear.default)
        if node.target is not aten.linear.default or value(node).dim() > 2  # not on vectors
    ]
    problems = {node: _problem(node) for node in layers}
    onednn_may_win = _where_onednn_may_win([n for n in layers if not problems[n]], cold, plain)
    for node in layers:
        form = None if problems[node] else _fastest(node, node in onednn_may_win, cold, plain)
        if report.count(problems[node] or ("" if form else "oneDNN is faster")):
            assert form is not None
            taken[form] += 1
            _rewrite(gm, node, form, plain)
    report.note = ", ".join(f"{count} {form}" for form, count in sorted(taken.items()))
    finish(gm)
    return report


def _problem(node: Node) -> str:
    x, weight, bias = node.args[0], node.args[1], _bias(node)
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if value(x).device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "not on a CPU with oneDNN"
    if any(isinstance(n, Node) and stage(n) != "weights" for n in (weight, bias)):
        return "the weight is computed from the inputs"
    if value(x).dtype != value(weight).dtype or why_not(value(x).dtype):
        return why_not(value(x).dtype) or "different dtypes"
    if geometry(node) is None:
        return "neither 1x1 nor 3x3 with padding 1, or in groups"
    return "" if possible_forms(node) else "channels not in whole vectors"


def _bias(node: Node) -> Any:
    return convolution_arguments(node)[2]


def _where_onednn_may_win(layers: list[Node], cold: bool, plain: bool) -> set[Node]:
    """Layers of the kinds of which oneDNN wins one of two: that with most products, that with most
    weights and of those the smallest image.
    """
    kinds: dict[Any, list[Node]] = {}
    for node in layers:
        kinds.setdefault((geometry(node), value(node).dim(), value(node).dtype), []).append(node)
    found: set[Node] = set()
    for nodes in kinds.values():
        largest = max(nodes, key=_products), max(nodes, key=lambda n: (_weights(n), -_products(n)))
        times = [_times(node, True, cold, plain) for node in largest]
        if any(one_dnn < min(own) for one_dnn, *own in times):
            found.update(nodes)
    return found


def _weights(node: Node) -> int:
    return operands(node)[1].numel()


def _products(node: Node) -> int:
    return value(node).numel() * operands(node)[1][0].numel()


def _fastest(node: Node, onednn_may_win: bool, cold: bool, plain: bool) -> Form | None:
    """None for oneDNN, which takes part if ``onednn_may_win``."""
    forms = _candidates(node)
    if len(forms) == 1 and not onednn_may_win:
        return forms[0]
    one_dnn, *own = _times(node, onednn_may_win, cold, plain)
    return forms[own.index(min(own))] if min(own) < _MARGIN * one_dnn else None


def _times(node: Node, onednn_may_win: bool, cold: bool, plain: bool) -> Sequence[float]:
    x, weight = operands(node)
    norm = norm_before(node)
    onednn_may_win = onednn_may_win and _one_dnn_runs(node)
    return _seconds(
        tuple(x.shape), tuple(weight.shape), (geometry(node) or ())[1], _candidates(node), x.dtype,
        0 if norm is None else GroupNormCall.of(norm.args).groups, onednn_may_win, plain, cold,
        torch.get_num_threads(),
    )  # fmt: skip


def _one_dnn_runs(node: Node) -> bool:
    x, weight = operands(node)
    if node.target is aten.linear.default:
        return packs_linear(x, weight)
    return packs(x, weight, *convolution_arguments(node)[3:])


def _candidates(node: Node) -> tuple[Form, ...]:
    """The forms that round no more than they may."""
    x, _ = operands(node)
    rounds = x.dtype is torch.bfloat16 and max(x.shape[2:]) > _SQUARES_IN_BFLOAT16
    spoiled = rounds and norm_before(node) is None
    return tuple(form for form in possible_forms(node) if not (spoiled and form == "squares"))


def _rewrite(gm: GraphModule, node: Node, form: Form, plain: bool) -> None:
    x, weight = node.args[:2]
    found = geometry(node)
    assert found is not None
    dtype = value(weight).dtype  # type: ignore[arg-type]
    with gm.graph.inserting_before(node):
        packed = gm.graph.call_function(filters, (uncast(weight), form, dtype, plain))
        packed.meta.update(val=value(weight), stage="weights")  # type: ignore[arg-type]
        written = ConvolveCall(x, packed, uncast(_bias(node)), form=form, stride=found[1])
        fused = gm.graph.call_function(CONVOLVE, written.arguments())
    fused.meta.update(val=node.meta["val"], stage="main")
    replace(node, fused)


@trial
def _seconds(
    shape: tuple[int, ...],
    filter_shape: tuple[int, ...],
    stride: int,
    forms: tuple[Form, ...],
    dtype: torch.dtype,
    groups: int,
    onednn_may_win: bool,
    plain: bool,
    cold: bool,
    threads: int,
) -> tuple[float, ...]:
    """Of oneDNN, forever unless it may win, and of each of ``forms``, after a norm of so many
    groups if there is one.

    ``threads`` only tells results apart.
    """
    x = torch.zeros(shape, dtype=dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    parameters = [torch.ones(filter_shape[1]) for _ in range(2)]

    def before(x: Tensor) -> Tensor:
        if not groups:
            return x
        image = x if x.dim() == 4 else x.transpose(1, 2)
        normed = group_norm_silu(image, parameters[0], parameters[1], groups, 1e-5)
        return normed if x.dim() == 4 else normed.transpose(1, 2)

    runs: list[Callable[[], Tensor]] = []
    if onednn_may_win:
        one_dnn = _one_dnn(x, filter_shape, stride)
        runs.append(lambda: one_dnn(before(x)))
    weight, offset = parameters if groups else (None, None)
    for form, u in blank_filters(filter_shape, forms, dtype, plain).items():
        given = ConvolveCall(
            x, u, form=form, stride=stride,
            groups=groups, weight=weight, offset=offset, silu=groups > 0,
        )  # fmt: skip
        # prepared by its first run, as in a network
        runs.append(functools.partial(CallSite(), *given.arguments()))
    times = best_times(runs, _REPEATS, warm=x if cold else None)
    return tuple(times) if onednn_may_win else (float("inf"), *times)


def _one_dnn(x: Tensor, shape: tuple[int, ...], stride: int) -> Callable[[Tensor], Tensor]:
    """oneDNN's layer with some weight of this shape."""
    weight = scratch_operand(math.prod(shape), x.dtype).view(shape)
    if x.dim() == 3:
        packed = mkldnn._reorder_linear_weight(weight, x.shape[:-1].numel())
        return lambda x: mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    padding, strides, ones = [shape[2] // 2] * 2, [stride, stride], [1, 1]
    packed = mkldnn._reorder_convolution_weight(weight, padding, strides, ones, 1, list(x.shape))
    trim()  # the largest of these is the peak of a build
    convolution = mkldnn._convolution_pointwise.default
    return lambda x: convolution(x, packed, None, padding, strides, ones, 1, "none", [], "")
