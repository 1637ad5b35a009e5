"""Concatenation without a copy: what is read side by side, what is not, and the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.networks import distance
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import Optimized, optimize
from stepfuse.kernels.products import vector_channels, why_not

TOLERANCE = {None: 3e-6, torch.bfloat16: 2e-2}  # four layers, each rounds to 8 bits in bfloat16

pytestmark = pytest.mark.skipif(
    not vector_channels(), reason="needs the C++ module (a C++ compiler)"
)
needs_bfloat16 = pytest.mark.skipif(bool(why_not(torch.bfloat16)), reason="needs AVX512-BF16 (CPU)")
dtypes = pytest.mark.parametrize(
    "dtype", [None, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
)


class Decoder(nn.Module):
    """The first layers of a decoder's block: a norm, a convolution, and a shortcut."""

    def __init__(self, c: int, skip: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(c, c, 3, padding=1)
        self.kept = nn.Conv2d(skip, skip, 1)
        self.norm = nn.GroupNorm(8, c + skip)
        self.conv = nn.Conv2d(c + skip, c, 3, padding=1)
        self.shortcut = nn.Conv2d(c + skip, c, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        both = torch.cat([self.body(x), self.kept(skip)], 1)
        out: Tensor = self.conv(F.silu(self.norm(both))) + self.shortcut(both)
        return out


class Elsewhere(Decoder):
    """The image is read by something that is no convolution."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        both = torch.cat([self.body(x), self.kept(skip)], 1)
        out: Tensor = self.conv(both) + both.mean((2, 3), keepdim=True)[:, :1]
        return out


class Three(Decoder):
    """Three images."""

    def __init__(self, c: int, skip: int) -> None:
        super().__init__(c, skip)
        self.kept = nn.Conv2d(skip // 2, skip // 2, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        h, kept = self.body(x), self.kept(skip[:, :32])
        out: Tensor = self.shortcut(torch.cat([h, kept, kept], 1))
        return out


class Residual(Decoder):
    """The image is a residual too."""

    def __init__(self, c: int, skip: int) -> None:
        super().__init__(c, skip)
        self.wide = nn.Conv2d(c + skip, c + skip, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        both = torch.cat([self.body(x), self.kept(skip)], 1)
        out: Tensor = both + self.wide(both)
        return out


@pytest.fixture(autouse=True)
def _only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """No form of oneDNN measures faster than ours."""

    def seconds(_x: Any, _w: Any, _stride: int, forms: tuple[str, ...], *_: Any) -> list[float]:
        return [1.0, *(0.5 for _ in forms)]

    monkeypatch.setattr("stepfuse.engine.compile.passes.convolution_forms._seconds", seconds)
    monkeypatch.setattr("stepfuse.engine.compile.network.pays", lambda *_: True)


def report(fast: Optimized) -> str:
    return str(next(r for r in fast.reports if r.name == "read_side_by_side"))


def inputs(c: int, skip: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, c, 6, 4), torch.randn(2, skip, 6, 4)


@dtypes
@pytest.mark.parametrize("widths", [(32, 32), (64, 32)])
@torch.no_grad()
def test_a_decoder_concatenates_nothing(widths: tuple[int, int], dtype: torch.dtype | None) -> None:
    model, given = Decoder(*widths).eval(), inputs(*widths)
    fast = optimize(model, given, dtype)
    assert report(fast) == "read_side_by_side      1 of 1"
    copied = optimize(model, given, dtype, without=["read_side_by_side"])
    assert torch.equal(fast(*given), copied(*given))
    assert distance(fast(*given), model(*given)) < TOLERANCE[dtype]
    for p in model.parameters():
        p.mul_(-1.25)
    fast.refresh()
    assert distance(fast(*given), model(*given)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("model", "widths", "why"),
    [
        (Decoder, (40, 24), "" if vector_channels() == 8 else "channels not in whole vectors"),
        (Elsewhere, (32, 64), "not only read by convolutions of ours"),
        (Residual, (32, 64), "not only read by convolutions of ours"),
        (Three, (32, 64), "not two images"),
    ],
)
@torch.no_grad()
def test_other_images_are_concatenated(model: Any, widths: tuple[int, int], why: str) -> None:
    module, given = model(*widths).eval(), inputs(*widths)
    fast = optimize(module, given)
    assert report(fast).endswith(f"0 of 1; 1 left: {why}" if why else "1 of 1")
    assert distance(fast(*given), module(*given)) < TOLERANCE[None]
