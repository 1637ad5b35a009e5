"""Decide by measurement, once per shape, whether a lower precision pays on this CPU."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.fx import Node

from stepfuse.engine.compile.graph import aten, value
from stepfuse.engine.compile.heap import trim
from stepfuse.engine.compile.layers import convolution_arguments, mkldnn, packs, possible_forms
from stepfuse.engine.compile.stopwatch import best_times, blank_filters, scratch_operand, trial
from stepfuse.kernels.convolve import CallSite, ConvolveCall
from stepfuse.kernels.filters import Form
from stepfuse.kernels.products import why_not

_REPEATS = 7  # a layer left in float32 by mistake costs the casts and copies around it
_MARGIN = 1.2  # float32 must win clearly: staying in one dtype saves the casts around it


def pays(node: Node, dtype: torch.dtype) -> bool:
    """False where a convolution is clearly faster in float32 than in ``dtype``; CPUs only.

    Both are timed with packed weights of the node's shapes, on zeros; a result is kept as long as
    the process runs. False too where oneDNN has no packed form of it in ``dtype``. Where
    `convolve` would do, that is timed, which leaves less behind than oneDNN's primitives.
    """
    if value(node).device.type != "cpu" or node.target is not aten.conv2d.default:
        return True
    x, weight, _, *geometry = convolution_arguments(node)
    *sizes, groups = geometry
    shapes = tuple(value(x).shape), tuple(value(weight).shape)
    frozen = tuple(tuple(g) for g in sizes)
    form = None if why_not(dtype) else next(iter(possible_forms(node)), None)
    if form is None and not packs(value(x).to(dtype), value(weight).to(dtype), *geometry):
        return False
    threads = torch.get_num_threads()
    low = _seconds(*shapes, frozen, groups, form, dtype, threads)
    return low < _MARGIN * _seconds(*shapes, frozen, groups, form, torch.float32, threads)


@trial
def _seconds(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    sizes: tuple[tuple[int, ...], ...],
    groups: int,
    form: Form | None,
    dtype: torch.dtype,
    threads: int,
) -> float:
    """The best of a few runs, in ``form`` or by oneDNN; ``threads`` only tells results apart."""
    x = torch.zeros(x_shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    if form is not None:
        u = blank_filters(w_shape, (form,), dtype)[form]
        given = ConvolveCall(x, u, form=form, stride=sizes[0][0]).arguments()
        return best_times([functools.partial(CallSite(), *given)], _REPEATS)[0]
    stride, padding, dilation = (list(size) for size in sizes)
    weight = scratch_operand(math.prod(w_shape), dtype).view(w_shape)
    packed = mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, list(x_shape)
    )
    trim()
    args: tuple[Any, ...] = (x, packed, None, padding, stride, dilation, groups, "none", [], "")
    return best_times([lambda: mkldnn._convolution_pointwise(*args)], _REPEATS)[0]
