"""Linear layers of one input become one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.networks import distance, traced
from torch import Tensor, nn

from stepfuse.engine.compile.graph import PassContext, aten, calls
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.passes.merge_linears import merge_linears
from stepfuse.engine.compile.stages import assign

REORDERED = 2e-6  # float32 sums in another order


class Attention(nn.Module):
    """q of the image; k and v of a text; a gate of the vector; layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.gate = nn.Linear(6, 10), nn.Linear(6, 10)
        self.k, self.v = nn.Linear(7, 10, bias=False), nn.Linear(7, 4, bias=False)
        self.odd = nn.Linear(7, 4)
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, text: Tensor, vector: Tensor) -> Tensor:
        q, gate = self.q(x), self.gate(x)
        attended = F.scaled_dot_product_attention(q * gate, self.k(text), self.v(text))
        vectors = self.a(vector) * self.b(vector)
        out: Tensor = attended + self.odd(text).sum(1, keepdim=True) + vectors.sum()
        return out


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 8, 6), torch.randn(2, 3, 7), torch.randn(2, 5)


@torch.no_grad()
def test_what_reads_the_same_is_merged() -> None:
    model, given = Attention().eval(), inputs()
    for without in ((), ("merge_linears",)):
        fast = optimize(model, given, without=without)
        done = "merge_linears          4 of 5; into 2; 1 left: no other reads the same"
        assert (done in fast.explain()) == (not without)
        assert distance(fast(*given), model(*given)) < REORDERED
        for p in model.parameters():
            p.mul_(-1.25)
        fast.refresh()
        assert distance(fast(*given), model(*given)) < REORDERED


@torch.no_grad()
def test_the_graph_has_one_product_for_them() -> None:
    weights = [torch.randn(n, 6) for n in (4, 2)]

    def function(x: Tensor, *w: Tensor) -> Any:
        return tuple(F.linear(x, part) for part in w)

    x = torch.randn(2, 3, 6)
    found = traced(function, x, *weights)
    report = merge_linears(found.gm, PassContext())
    assert report.left == {"the weight is computed from the inputs": 2}
    for node in found.gm.graph.nodes:
        if node.op == "placeholder" and node is not next(iter(found.gm.graph.nodes)):
            node.meta["weight"] = node.name
    assign(found.gm)
    report = merge_linears(found.gm, PassContext())
    assert (report.matched, report.candidates) == (2, 2)
    assert len(calls(found.gm, aten.linear.default)) == 1
    for got, exact in zip(found.gm(x, *weights), function(x, *weights), strict=True):
        assert distance(got, exact) < REORDERED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_lower_precision(dtype: torch.dtype) -> None:
    model, given = Attention().eval(), inputs()
    exact = model(*given)
    apart = distance(optimize(model, given, dtype, without=["merge_linears"])(*given), exact)
    assert distance(optimize(model, given, dtype)(*given), exact) < 1.5 * apart + REORDERED
