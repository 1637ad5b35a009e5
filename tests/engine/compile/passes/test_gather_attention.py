"""Attention written out in any order of dimensions is found; what only looks like it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.compile.networks import distance, traced
from torch import Tensor

from stepfuse.engine.compile.graph import SDPA, PassContext, aten, calls
from stepfuse.engine.compile.passes.gather_attention import gather_attention
from stepfuse.engine.compile.passes.remove_no_ops import remove_no_ops
from stepfuse.engine.compile.passes.widen_conv1d import widen_conv1d

# float32 sums in another order
REORDERED = 2e-6
einsum = torch.einsum

# channels first [b, c, t] and [b, c, s], tokens [n, h, t, c] and [n, h, s, c]
FLAT = [torch.randn(6, 5, 7), torch.randn(6, 5, 4), torch.randn(6, 3, 4)]
HEADS = [torch.randn(2, 3, 7, 5), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6)]


def adm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = einsum("bct,bcs->bts", q * 0.7, k * 0.9).float().softmax(-1).type(q.dtype)
    return einsum("bts,bcs->bct", w, v)


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum("bts,bcs->btc", einsum("bct,bcs->bts", q, k).softmax(2), v)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum("bcs,bst->bct", v, einsum("bcs,bct->bst", k, q).softmax(1))


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm((torch.bmm(q.transpose(1, 2), k) / 3).softmax(-1), v.transpose(1, 2))


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def spaced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (einsum("b h i d, b h j d -> b h i j", q, k) * 0.5).softmax(dim=-1)
    return einsum("b h i j, b h j d -> b h i d", w, v)


def crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the second product exchanges samples and heads of v
    w = einsum("nhtc,nhsc->nhts", q[:, :2], k[:, :2]).softmax(-1)
    return einsum("hnts,nhsd->nhtd", w, v[:, :2])


CASES = [(f, FLAT) for f in (adm, unscaled, keys_first, by_bmm)]
CASES += [(f, HEADS) for f in (by_matmul, spaced, crossed)]


@pytest.mark.parametrize(("function", "inputs"), CASES)
@torch.no_grad()
def test_attention_is_found(function: Any, inputs: list[Tensor]) -> None:
    found = traced(function, *inputs)
    remove_no_ops(found.gm, PassContext())  # casts to the same dtype, and assertions that read them
    done = gather_attention(found.gm, PassContext())
    assert (done.matched, done.candidates) == (1, 1)
    assert not calls(found.gm, aten.einsum.default, aten.softmax.int, aten.matmul.default)
    assert len(calls(found.gm, SDPA)) == 1
    assert distance(found.gm(*inputs)[0], function(*inputs)) < REORDERED


def read_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ k.transpose(-1, -2)).softmax(-1)
    return w @ v + w.sum()


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) + 1.5 * q[..., :1]).softmax(-1) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    context = einsum("nhsc,nhsd->nhcd", k.softmax(-2), v)
    return einsum("nhtc,nhcd->nhtd", q.softmax(-1), context)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-2) @ v


@pytest.mark.parametrize("function", [read_twice, shifted, linear, over_queries])
@torch.no_grad()
def test_what_looks_alike_keeps_its_meaning(function: Any) -> None:
    found = traced(function, *HEADS)
    done = gather_attention(found.gm, PassContext())
    assert done.matched == 0
    assert set(done.left) == {"softmax of something else"}
    assert distance(found.gm(*HEADS)[0], function(*HEADS)) < REORDERED


@pytest.mark.parametrize(
    ("size", "options"),
    [(1, {}), (3, {"padding": 1}), (2, {"stride": 2, "dilation": 3, "groups": 2, "bias": False})],
)
@torch.no_grad()
def test_a_conv1d_is_a_flat_conv2d(size: int, options: dict[str, Any]) -> None:
    model, x = torch.nn.Conv1d(4, 6, size, **options), torch.randn(3, 4, 11)
    found = traced(lambda x: model(x), x)
    done = widen_conv1d(found.gm, PassContext())
    assert (done.matched, done.candidates) == (1, 1)
    assert not calls(found.gm, aten.conv1d.default)
    held = list(found.constants.values())
    assert distance(found.gm(*held, x)[0], model(x)) < REORDERED
