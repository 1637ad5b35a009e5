"""Which layers take which form, and that a norm, a residual and new weights follow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.networks import distance
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import Optimized, optimize
from stepfuse.engine.compile.passes.convolution_forms import _seconds
from stepfuse.engine.compile.weights.watched import Holding
from stepfuse.kernels.products import vector_channels, why_not

# sums of a few hundred terms in another order; bfloat16: four layers of three roundings, 2^-9 each
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}
FORMS = "stepfuse.engine.compile.passes.convolution_forms"
SECONDS = f"{FORMS}._seconds"

pytestmark = pytest.mark.skipif(
    not vector_channels(), reason="needs the C++ module (a C++ compiler)"
)
needs_bfloat16 = pytest.mark.skipif(bool(why_not(torch.bfloat16)), reason="needs AVX512-BF16 (CPU)")
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)


class Body(nn.Module):
    """Layers of every kind the pass must tell apart, a residual block, and attention's linears."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.no_bias = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.point = nn.Conv2d(32, 64, 1)
        self.tokens_norm = nn.GroupNorm(8, 64)
        self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 64)
        self.back = nn.Linear(96, 64)
        self.strided = nn.Conv2d(64, 32, 3, padding=1, stride=2)
        self.narrow = nn.Conv2d(32, 3, 3, padding=1)
        self.vector = nn.Linear(3, 32)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.plain(x)
        h = h + self.no_bias(F.silu(self.norm(h + self.vector(e)[:, :, None, None])))
        h = self.point(h)
        tokens = self.tokens_norm(h.flatten(2)).transpose(1, 2)
        tokens = self.back(torch.cat([self.q(tokens), self.k(tokens)], -1))
        h = h + tokens.transpose(1, 2).reshape(h.shape)
        out: Tensor = self.narrow(self.strided(h))
        return out


def prefer(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this form, or else the first possible one, measure fastest."""

    def seconds(_x: Any, _w: Any, _stride: int, forms: tuple[str, ...], *_: Any) -> list[float]:
        wanted = form if form in forms else forms[0]
        return [1.0 if form != "oneDNN" else 0.1, *(0.5 + (f != wanted) for f in forms)]

    monkeypatch.setattr(SECONDS, seconds)
    monkeypatch.setattr("stepfuse.engine.compile.network.pays", lambda *_: True)


def report(fast: Optimized, name: str) -> Any:
    return next(r for r in fast.reports if r.name == name)


@dtypes
@pytest.mark.parametrize(
    ("form", "taken"),
    [
        ("squares", "3 dense, 1 direct, 2 squares"),
        ("lines", "3 dense, 1 direct, 2 lines"),
        ("direct", "3 dense, 3 direct"),
        ("oneDNN", ""),
    ],
)
@torch.no_grad()
def test_the_pass_takes_what_is_faster(
    form: str, taken: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(form, monkeypatch)
    model, inputs = Body().eval(), (torch.randn(2, 32, 10, 6), torch.randn(2, 3))
    fast = optimize(model, inputs, dtype)
    forms = report(fast, "convolution_forms")
    assert forms.note == taken
    assert (forms.matched, forms.candidates) == (0 if form == "oneDNN" else 6, 7)
    assert forms.left["channels not in whole vectors"] == 1
    assert str(report(fast, "merge_linears")).endswith("into 1; 1 left: no other reads the same")
    folded = report(fast, "fold_group_norm")
    assert (folded.matched, folded.candidates) == (0 if form == "oneDNN" else 2, 2)
    assert report(fast, "fuse_residual_add").matched == 2
    assert distance(fast(*inputs), model(*inputs)) < TOLERANCE[dtype]
    for p in model.parameters():
        p.mul_(-1.25)
    fast.refresh()
    assert distance(fast(*inputs), model(*inputs)) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("name", ["fold_group_norm", "merge_linears", "fuse_residual_add"])
@torch.no_grad()
def test_the_passes_beside_it_may_be_left_out(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer("squares", monkeypatch)
    model, inputs = Body().eval(), (torch.randn(2, 32, 10, 6), torch.randn(2, 3))
    fast = optimize(model, inputs, dtype, without=[name])
    assert f"left out               {name}" in fast.explain()
    assert distance(fast(*inputs), model(*inputs)) < TOLERANCE[dtype]


@needs_bfloat16
@torch.no_grad()
def test_large_rounded_images_are_not_cut_into_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("squares", monkeypatch)
    model = Body().eval()
    for width, without, squares in ((16, (), 2), (18, (), 1), (18, ("fuse_group_norm_silu",), 0)):
        inputs = (torch.randn(1, 32, 4, width), torch.randn(1, 3))
        fast = optimize(model, inputs, torch.bfloat16, without=without)
        note = report(fast, "convolution_forms").note
        assert (f"{squares} squares" in note) if squares else ("squares" not in note), note


@torch.no_grad()
def test_a_norm_stays_where_something_else_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("lines", monkeypatch)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(4, 32), nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.norm(self.conv(x)))
            out: Tensor = self.conv(h) * h
            return out

    model, x = Twice().eval(), torch.randn(1, 32, 4, 6)
    fast = optimize(model, (x,))
    assert "0 of 1; 1 left: its result is read more than once" in str(
        report(fast, "fold_group_norm")
    )
    assert distance(fast(x), model(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, (3, 1), padding=(1, 0)),
        nn.Conv2d(32, 32, 1, stride=2),
        nn.Conv2d(32, 32, 5, padding=2),
    ],
)
@torch.no_grad()
def test_other_convolutions_are_left(conv: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer("lines", monkeypatch)
    x = torch.randn(1, 32, 8, 8)
    fast = optimize(conv, (x,))
    assert "1 left: neither 1x1 nor 3x3 with padding 1, or in groups" in fast.explain()
    assert distance(fast(x), conv(x)) < TOLERANCE[torch.float32]


@dtypes
@pytest.mark.parametrize("weights", ["parked", "released"])
@torch.no_grad()
def test_constants_are_no_larger_than_weights_that_left(
    weights: Holding, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters are plain in float32."""
    prefer("squares", monkeypatch)
    model, inputs = Body().eval(), (torch.randn(2, 32, 10, 6), torch.randn(2, 3))
    exact = model(*inputs)
    whole = sum(p.nbytes for p in model.parameters())
    fast = optimize(model, inputs, dtype, weights=weights)
    assert report(fast, "convolution_forms").note == "3 dense, 1 direct, 2 squares"
    (network,) = fast.networks
    assert network.nbytes() <= whole * (1 if dtype is torch.float32 else 0.9)
    assert distance(fast(*inputs), exact) < TOLERANCE[dtype]


class Kinds(nn.Module):
    """Five 3x3 convolutions of one kind, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 96, 32, 256, 32)
        self.body = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.body):
            x = conv(F.avg_pool2d(x, 2) if i == 2 else x)
        out: Tensor = self.last(x)
        return out


@pytest.mark.parametrize(
    ("wins", "asked"),
    [
        ((), {(32, 256), (64, 96), (32, 32)}),  # most weights, most products, and the 1x1
        ((64, 96), {(32, 64), (64, 96), (96, 32), (32, 256), (256, 32), (32, 32)}),
        ((32, 32), {(32, 256), (64, 96), (32, 32)}),
    ],
)
@torch.no_grad()
def test_one_dnn_is_asked_about_the_largest_first(
    wins: tuple[int, ...], asked: set[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def seconds(*arguments: Any) -> list[float]:
        channels = (arguments[1][1], arguments[1][0])
        if not arguments[6]:
            return [float("inf"), *(1.0 for _ in arguments[3])]
        seen.add(channels)
        return [0.5 if channels == wins else 2.0, *(1.0 for _ in arguments[3])]

    monkeypatch.setattr(SECONDS, seconds)
    model, x = Kinds().eval(), torch.randn(1, 32, 8, 8)
    exact = model(x)
    fast = optimize(model, (x,))
    assert seen == asked
    assert report(fast, "convolution_forms").left["oneDNN is faster"] == bool(wins)
    assert distance(fast(x), exact) < TOLERANCE[torch.float32]


@dtypes
@pytest.mark.parametrize("cold", [False, True])
@torch.no_grad()
def test_the_shapes_are_measured(dtype: torch.dtype, cold: bool) -> None:
    threads = torch.get_num_threads()
    for x, weight, forms in (
        ((1, 32, 4, 4), (32, 32, 3, 3), ("direct", "lines", "squares")),
        ((1, 32, 5, 4), (64, 32, 1, 1), ("dense",)),
        ((1, 7, 32), (64, 32), ("dense",)),
    ):
        for groups, asked, plain in ((0, True, False), (4, True, True), (4, False, True)):
            one_dnn, *own = _seconds(
                x, weight, 1, forms, dtype, groups, asked, plain, cold, threads
            )
            assert len(own) == len(forms)
            assert all(0 < t < 1 for t in own)
            assert 0 < one_dnn < 1 if asked else one_dnn == float("inf")
