"""Attention as two matrix products, where that is faster than the fused operator.

    sdpa(q, k, v) ──► softmax(q k^T / sqrt(d)) v        q, k, v [N, heads, L, d]

PyTorch's fused attention for CPUs works in small tiles that bfloat16 instructions cannot fill: at
256 positions and 256 channels it takes three times as long as the products themselves. One head in
float32 goes to oneDNN, sample by sample: q k^T is a linear layer whose weight is k. Head widths and
the number of positions are free; the [L, L] weights must stay small. Exact up to the order of
summation in float32; in bfloat16 the logits are rounded too, relative 2^-9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from stepfuse.engine.passes.graph import PassReport, aten, call, calls, finish, replace, value
from stepfuse.engine.passes.stopwatch import best_times

mkldnn = torch.ops.mkldnn
SDPA = aten.scaled_dot_product_attention.default
MOST_WEIGHTS = 1 << 22  # entries of N * heads * L * L: 16 MB in float32
MOST_SAMPLES = 32
_REPEATS = 3
Build = Callable[[Callable[..., Any], Any, Any, Any, float], Any]


def attention(gm: GraphModule) -> PassReport:
    """Write out every unmasked attention on the CPU that is faster so, by measurement."""
    report = PassReport("attention")
    for node in calls(gm, SDPA):
        problem, build, scale = _choice(node)
        if report.count(problem):
            q, k, v = node.args[:3]
            with gm.graph.inserting_before(node):
                written = build(functools.partial(call, gm.graph), q, k, v, scale)
            replace(node, written)
    finish(gm)
    return report


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


def _choice(node: Node) -> tuple[str, Build, float]:
    """(why it stays as it is, or "", how to write it out, scale)."""
    masks = dict(zip(("mask", "dropout", "causal"), node.args[3:], strict=False))
    masks.update(node.kwargs)
    scale = masks.pop("scale", None)
    q, k, v = (value(n) for n in node.args[:3] if isinstance(n, Node))
    scale = float(scale) if isinstance(scale, (int, float)) else q.shape[-1] ** -0.5
    if any(masks.values()):
        return "masked, causal or with dropout", batched, scale
    if q.device.type != "cpu":
        return "not on the CPU", batched, scale
    if q.dim() != 4 or q.shape[:2] != k.shape[:2] or k.dtype not in (torch.float32, torch.bfloat16):
        return "of a shape or dtype without another form", batched, scale
    if q.shape[:-1].numel() * k.shape[2] > MOST_WEIGHTS:
        return "more positions than are worth writing out", batched, scale
    strides = tuple(tuple(part.stride()) for part in (q, k, v))
    shapes = tuple(tuple(part.shape) for part in (q, k, v))
    forms: list[Build] = [batched]
    if q.shape[1] == 1 and q.shape[0] <= MOST_SAMPLES and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        forms.append(one_by_one)
    times = _seconds(shapes, strides, q.dtype, tuple(forms), torch.get_num_threads())
    best = min(range(len(times)), key=times.__getitem__)
    return (
        ("the fused operator is faster", batched, scale)
        if best == 0
        else (
            "",
            forms[best - 1],
            scale,
        )
    )


def _directly(target: Any, *args: Any) -> Any:
    return target(*args)


@functools.cache
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
