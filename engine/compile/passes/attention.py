"""Attention in the form that is fastest here.

    sdpa(q, k, v) ──► attention(q, k, v)                    the C++ module's operator
                  ──► softmax(q k^T / sqrt(d)) v            two products, q, k, v [N, heads, L, d]

PyTorch's fused attention for CPUs works in small tiles that bfloat16 instructions cannot fill: at
256 positions and 256 channels it takes three times as long as the products themselves. Written
out, one head goes to oneDNN, sample by sample: q k^T is a linear layer whose weight is k. Head
widths and the number of positions are free; the [L, L] weights of products must stay small. Exact
up to the order of summation in float32; in bfloat16 weights are rounded, and the logits of products
too, relative 2^-9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import (
    SDPA,
    PassContext,
    PassReport,
    aten,
    call,
    calls,
    finish,
    replace,
    value,
)
from stepfuse.engine.compile.layers import mkldnn
from stepfuse.engine.compile.runs import runs
from stepfuse.engine.compile.stopwatch import best_times, trial
from stepfuse.kernels.attention import OP as ATTENTION
from stepfuse.kernels.attention import attention as run_attention
from stepfuse.kernels.products import why_not

MOST_WEIGHTS = 1 << 22  # entries of N * heads * L * L: 16 MB in float32
MOST_SAMPLES = 32
_REPEATS = 3
Build = Callable[[Callable[..., Any], Any, Any, Any, float], Any]


def attention(gm: GraphModule, context: PassContext) -> PassReport:
    """Write out every unmasked attention on the CPU that is faster so, by measurement."""
    report = PassReport("attention")
    for node in calls(gm, SDPA):
        problem = _problem(node)
        form = None if problem else _fastest(node)
        if report.count(problem or ("" if form else "the fused operator is faster")):
            assert form is not None
            q, k, v = node.args[:3]
            with gm.graph.inserting_before(node):
                written = form(functools.partial(call, gm.graph), q, k, v, _scale(node))
            replace(node, written)
    finish(gm)
    return report


def by_operator(apply: Callable[..., Any], q: Any, k: Any, v: Any, scale: float) -> Any:
    """The C++ module's operator."""
    return apply(ATTENTION, q, k, v, scale)


def batched(apply: Callable[..., Any], q: Any, k: Any, v: Any, scale: float) -> Any:
    """All heads of all samples in two batched products."""
    turned = apply(aten.transpose.int, k, -1, -2)
    logits = apply(aten.matmul.default, apply(aten.mul.Tensor, q, scale), turned)
    return apply(aten.matmul.default, apply(aten.softmax.int, logits, -1), v)


def one_by_one(apply: Callable[..., Any], q: Any, k: Any, v: Any, scale: float) -> Any:
    """The single head of every sample by oneDNN: a linear layer with weight k, one with v^T."""
    scaled = apply(aten.mul.Tensor, q, scale)
    samples = []
    for n in range(_shape(q)[0]):
        q_n, k_n, v_n = (
            apply(aten.select.int, apply(aten.select.int, part, 0, n), 0, 0)
            for part in (scaled, k, v)
        )
        logits = apply(mkldnn._linear_pointwise.default, q_n, k_n, None, "none", [], "")
        weights = apply(aten.softmax.int, logits, -1)
        turned = apply(aten.transpose.int, v_n, 0, 1)
        samples.append(
            apply(mkldnn._linear_pointwise.default, weights, turned, None, "none", [], "")
        )
    return apply(aten.unsqueeze.default, apply(aten.stack.default, samples, 0), 1)


def _shape(q: Any) -> torch.Size:
    return value(q).shape if isinstance(q, Node) else q.shape


def _problem(node: Node) -> str:
    """Why it has no other form here; empty where it has."""
    mask, dropout, causal = (*node.args[3:6], *(None,) * 3)[:3]
    named = (node.kwargs.get(name) for name in ("attn_mask", "dropout_p", "is_causal"))
    q, k, _ = _operands(node)
    if any((mask, dropout, causal, *named)):
        return "masked, causal or with dropout"
    if q.device.type != "cpu":
        return "not on the CPU"
    if q.dim() != 4 or q.shape[:2] != k.shape[:2] or k.dtype not in (torch.float32, torch.bfloat16):
        return "of a shape or dtype without another form"
    if not _scale(node) > 0:
        return "a scale that is not positive"
    return "" if _forms(*_operands(node)) else "no other form runs here, or is worth writing out"


def _forms(q: Tensor, k: Tensor, v: Tensor) -> list[Build]:
    """Those that can compute it."""
    forms: list[Build] = []
    if not why_not(q.dtype) and q.dtype == v.dtype and q.shape[-1] % 2 == 0:
        forms.append(by_operator)
    n, heads, positions, _ = q.shape
    if n * heads * positions * k.shape[2] <= MOST_WEIGHTS:
        forms.append(batched)
        one_dnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        # oneDNN has no fast path for rows with a gap between them
        dense = all(x.stride()[2:] == (x.shape[3], 1) for x in (q, k, v))
        if heads == 1 and n <= MOST_SAMPLES and one_dnn and dense:
            forms.append(one_by_one)
    if q.dtype is torch.float32:
        return forms
    return [form for form in forms if runs(form, _directly, q, k, v, 1.0)]


def _fastest(node: Node) -> Build | None:
    """The form that is faster than the fused operator, None where there is none."""
    parts = _operands(node)
    forms = _forms(*parts)
    shapes = tuple(tuple(part.shape) for part in parts)
    strides = tuple(tuple(part.stride()) for part in parts)
    fused, *times = _seconds(shapes, strides, parts[0].dtype, tuple(forms), torch.get_num_threads())
    best = min(times)
    return forms[times.index(best)] if best < fused else None


def _operands(node: Node) -> list[Tensor]:
    """What stands for q, k and v."""
    return [value(n) for n in node.args[:3] if isinstance(n, Node)]


def _scale(node: Node) -> float:
    given = node.kwargs.get("scale")
    width = _operands(node)[0].shape[-1]
    return float(given) if isinstance(given, (int, float)) else float(width**-0.5)


def _directly(target: Any, *args: Any) -> Any:
    return run_attention(*args) if target is ATTENTION else target(*args)


@trial
def _seconds(
    shapes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    forms: tuple[Build, ...],
    threads: int,
) -> list[float]:
    """The best times of the fused operator and of each form; ``threads`` tells results apart."""
    q, k, v = (
        torch.empty_strided(shape, stride, dtype=dtype).fill_(0.1)
        for shape, stride in zip(shapes, strides, strict=True)
    )
    runs: list[Callable[[], Tensor]] = [lambda: F.scaled_dot_product_attention(q, k, v)]
    runs += [functools.partial(form, _directly, q, k, v, 1.0) for form in forms]
    return best_times(runs, _REPEATS)
