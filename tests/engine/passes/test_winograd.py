"""Convolutions with fewer products: against the formula, at any size, chosen where faster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.engine.passes.networks import distance
from torch import Tensor, nn

from stepfuse.engine.optimize import optimize
from stepfuse.engine.passes.winograd import filters, fits, native, why_not, winograd
from stepfuse.engine.passes.winograd_convolutions import _seconds

# sums of a few hundred terms in another order, of up to four pixels and nine weights each
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}  # bfloat16: three roundings of 2^-9
SECONDS = "stepfuse.engine.passes.winograd_convolutions._seconds"
LINES, SQUARES, DIRECT = (2.0, 1.0, 1.5), (2.0, 1.5, 1.0), (1.0, 1.0, 0.99)
SHAPES = [
    (1, 32, 2, 2),  # one tile
    (2, 64, 6, 10),
    (3, 32, 8, 6),
    (5, 32, 4, 4),  # samples in groups
    (1, 96, 34, 64),  # strips, and a remainder of positions
    (3, 32, 1, 2),  # an odd height: lines only
]

pytestmark = pytest.mark.skipif(native is None, reason="needs the C++ module (a C++ compiler)")
dtypes = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(bool(why_not(torch.bfloat16)), reason="needs AVX512-BF16"),
        ),
    ],
)


@dtypes
@pytest.mark.parametrize(
    ("shape", "square"), [(s, square) for s in SHAPES for square in (False, True)[: 2 - s[2] % 2]]
)
@pytest.mark.parametrize("extras", [False, True])
@torch.no_grad()
def test_it_is_the_convolution(
    shape: tuple[int, ...], square: bool, dtype: torch.dtype, extras: bool
) -> None:
    assert fits(torch.Size(shape), 64, square)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, shape[1], 3, 3)
    bias = 10 * torch.randn(64) if extras else None
    exact = F.conv2d(
        x.double(), weight.double(), bias if bias is None else bias.double(), padding=1
    )
    residual = torch.randn(exact.shape).to(dtype) if extras else None
    if residual is not None:
        exact = exact + residual
    found = winograd(x, filters(weight, square, dtype), bias, residual, square)
    assert found.dtype is dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert distance(found, exact) < TOLERANCE[dtype]
    # whatever the layout of the image, and the number of threads
    assert torch.equal(
        winograd(x.contiguous(), filters(weight, square, dtype), bias, residual, square), found
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = winograd(x, filters(weight, square, dtype), bias, residual, square)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, found)


def test_filters_of_another_network_are_refused() -> None:
    u = filters(torch.randn(32, 64, 3, 3), False, torch.float32)
    with pytest.raises(ValueError, match="does not fit filters"):
        winograd(torch.randn(1, 32, 4, 4), u, None, None, False)


def test_the_operator_has_shapes_without_data() -> None:
    x, weight = torch.randn(2, 32, 6, 4), torch.randn(64, 32, 3, 3)
    u = filters(weight, True, torch.float32)
    torch.library.opcheck(winograd, (x, u, torch.randn(64), None, True))


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets_agree(isa: str) -> None:
    """In a process of their own, since the module is chosen at import."""
    code = """
import torch, torch.nn.functional as F
from stepfuse.engine.passes.winograd import filters, winograd
torch.manual_seed(0)
x, w, b = torch.randn(2, 64, 6, 10), torch.randn(32, 64, 3, 3), torch.randn(32)
for square in (False, True):
    y = winograd(x, filters(w, square, x.dtype), b, None, square)
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=1)
    assert float((y - exact).norm() / exact.norm()) < 3e-6
print("agrees")
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "STEPFUSE_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if "must be one of" in found.stderr:
        pytest.skip(f"needs a processor with {isa}")
    assert found.stdout.strip() == "agrees", found.stderr


class Body(nn.Module):
    """Convolutions of every kind the pass must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(32, 32, 3, padding=1)
        self.no_bias = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.strided = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.narrow = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.plain(x)
        out: Tensor = self.narrow(self.strided(h + self.no_bias(h)))
        return out


@dtypes
@pytest.mark.parametrize(
    ("times", "matched", "squares"), [(LINES, 2, 0), (SQUARES, 2, 2), (DIRECT, 0, 0)]
)
@torch.no_grad()
def test_the_pass_takes_what_is_faster(
    times: tuple[float, ...],
    matched: int,
    squares: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SECONDS, lambda *_: times)
    monkeypatch.setattr("stepfuse.engine.passes.network.pays", lambda *_: True)
    model, x = Body().eval(), torch.randn(2, 32, 10, 6)
    fast = optimize(model, (x,), dtype)
    (network,) = fast._networks.values()
    done = next(r for r in network.reports if r.name == "winograd_convolutions")
    assert (done.matched, done.candidates) == (matched, 4)
    assert done.note == f"{squares} in squares, {min(matched, 1)} with a residual"
    assert done.left["not 3x3 with stride 1 and padding 1"] == 1
    # four layers
    assert distance(fast(x), model(x)) < 2 * TOLERANCE[dtype]
    for p in model.parameters():
        p.mul_(-1.25)
    fast.refresh()
    assert distance(fast(x), model(x)) < 2 * TOLERANCE[dtype]


@torch.no_grad()
def test_large_images_in_bfloat16_are_not_cut_into_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not(torch.bfloat16):
        pytest.skip("needs AVX512-BF16")
    monkeypatch.setattr(SECONDS, lambda *_: SQUARES)
    monkeypatch.setattr("stepfuse.engine.passes.network.pays", lambda *_: True)
    for width, squares in ((16, 2), (18, 0)):
        fast = optimize(Body().eval(), (torch.randn(1, 32, 4, width),), dtype=torch.bfloat16)
        assert f"2 of 4; {squares} in squares" in fast.explain()


@dtypes
@pytest.mark.parametrize("cold", [False, True])
@torch.no_grad()
def test_the_shapes_are_measured(dtype: torch.dtype, cold: bool) -> None:
    direct, lines, squares = _seconds((1, 32, 5, 4), 32, dtype, cold, torch.get_num_threads())
    assert 0 < direct < 1
    assert 0 < lines < 1
    assert squares == float("inf"), "an odd height"
