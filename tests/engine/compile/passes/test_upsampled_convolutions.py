"""Upsampling merged into the convolution: the same images, at any size, where it is faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.networks import ONEDNN_DTYPES, distance
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.passes.upsampled_convolutions import _seconds, summed
from stepfuse.kernels.products import vector_channels, why_not

# sums of up to four weights, then of a few hundred products, in another order
REORDERED = 2e-6
BFLOAT16 = 1e-2  # four layers, each rounds weights and images to 8 bits, 2^-9 relative
SECONDS = "stepfuse.engine.compile.passes.upsampled_convolutions._seconds"


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 5), (2, 7, 4, 3), (3, 16, 8, 8)])
def test_the_transposed_convolution_is_the_same_function(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).double(), torch.randn(5, shape[1], 3, 3).double()
    exact = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    found = F.conv_transpose2d(x, summed(weight), stride=2, padding=1)
    assert torch.allclose(found, exact, rtol=0, atol=1e-12)


class Body(nn.Module):
    """Enlargements of every kind the pass must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.point = nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        h = self.b(F.interpolate(h, scale_factor=2, mode="nearest"))
        h = self.point(F.interpolate(h, scale_factor=2.0, mode="nearest"))  # not 3x3
        read_twice = F.interpolate(h, scale_factor=2.0, mode="nearest")
        h = self.c(read_twice) + read_twice[:, :4]
        out: Tensor = self.c(F.interpolate(torch.cat([h, h], 1), scale_factor=3.0, mode="nearest"))
        return out


@pytest.mark.parametrize("dtype", ONEDNN_DTYPES)
@torch.no_grad()
def test_the_pass_merges_what_is_faster(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SECONDS, lambda *_: (2.0, 1.0, 3.0))
    monkeypatch.setattr("stepfuse.engine.compile.network.pays", lambda *_: True)
    model, x = Body().eval(), torch.randn(2, 6, 3, 5)
    # that may take what is not enlarged, where vectors are short
    fast = optimize(model, (x,), dtype, without=["convolution_forms"])
    (network,) = fast.networks
    done = next(r for r in network.reports if r.name == "upsampled_convolutions")
    assert (done.matched, done.candidates) == (2, 5)
    assert dict(done.left) == {
        "not 3x3 with stride 1 and padding 1": 1,
        "not read by one convolution alone": 1,
        "not enlarged twice": 1,
    }
    packed = next(r for r in network.reports if r.name == "prepack_convolutions")
    assert packed.matched == packed.candidates == 5
    tolerance = REORDERED if dtype is None else BFLOAT16
    assert distance(fast(x), model(x)) < tolerance
    for p in model.parameters():
        p.mul_(-1.25)
    fast.refresh()
    assert distance(fast(x), model(x)) < tolerance


@torch.no_grad()
def test_what_is_slower_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SECONDS, lambda *_: (1.0, 1.0, 1.0))
    fast = optimize(Body().eval(), (torch.randn(2, 6, 3, 5),))
    assert "2 left: the direct convolution is faster" in fast.explain()


def test_the_shapes_are_measured() -> None:
    threads = torch.get_num_threads()
    *found, own = _seconds((1, 5, 3, 5), 7, torch.float32, False, True, threads)
    assert all(0 < s < 1 for s in found)
    assert own == float("inf"), "channels not in whole vectors"
    if vector_channels():
        direct, transposed, own = _seconds((1, 32, 3, 5), 64, torch.float32, True, False, threads)
        assert all(0 < s < 1 for s in (direct, own))
        tried = own >= direct * 16 / 36
        assert (0 < transposed < 1) if tried else transposed == float("inf")


class Wide(nn.Module):
    """An enlargement whose channels are whole vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


@pytest.mark.skipif(not vector_channels(), reason="needs the C++ module (a C++ compiler)")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_nine_products_where_they_are_faster(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype is not None and why_not(dtype):
        pytest.skip("needs AVX512-BF16 (CPU)")
    monkeypatch.setattr(SECONDS, lambda *_: (3.0, 2.0, 1.0))
    monkeypatch.setattr("stepfuse.engine.compile.network.pays", lambda *_: True)
    model, x = Wide().eval(), torch.randn(2, 32, 3, 5)
    fast = optimize(model, (x,), dtype)
    assert "upsampled_convolutions 1 of 1; 1 enlarged" in fast.explain()
    tolerance = REORDERED if dtype is None else BFLOAT16
    assert distance(fast(x), model(x)) < tolerance
    for p in model.parameters():
        p.mul_(-1.25)
    fast.refresh()
    assert distance(fast(x), model(x)) < tolerance
