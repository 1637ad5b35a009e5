"""Convolutions by tiles: against the formula, at any size, and chosen where they are faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.engine.passes.networks import distance
from torch import Tensor, nn

from stepfuse.engine.optimize import optimize
from stepfuse.engine.passes.winograd import FREQUENCIES, filters, offsets, packed_shape, winograd

# transforms with entries up to 8: a few times the rounding of the direct sum
TILED = 2e-5
SECONDS = "stepfuse.engine.passes.winograd_convolutions._seconds"


def by_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        filters(weight), [0, 0], [1, 1], [1, 1], FREQUENCIES, packed_shape(x.shape, x.shape[1])
    )
    placed = None if bias is None else offsets(bias)
    return winograd(x, packed, placed, weight.shape[0])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (3, 32, 7, 9), (5, 16, 32, 20), (2, 48, 1, 2)])
@torch.no_grad()
def test_tiles_give_the_convolution(shape: tuple[int, ...], with_bias: bool) -> None:
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, shape[1], 3, 3)
    bias = 10 * torch.randn(32) if with_bias else None
    exact = F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), padding=1
    )
    found = by_tiles(x, weight, bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert distance(found, exact) < TILED
    # images without the channels-last layout go through a copy
    assert torch.equal(by_tiles(x.contiguous(), weight, bias), found)


class Body(nn.Module):
    """Convolutions of every kind the pass must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(16, 32, 3, padding=1)
        self.no_bias = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.strided = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.narrow = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.plain(x)
        out: Tensor = self.narrow(self.strided(h + self.no_bias(h)))
        return out


@pytest.mark.parametrize(("times", "matched"), [((2.0, 1.0), 2), ((1.1, 1.0), 0)])
@torch.no_grad()
def test_the_pass_takes_what_is_clearly_faster(
    times: tuple[float, float], matched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SECONDS, lambda *_: times)
    model, x = Body().eval(), torch.randn(2, 16, 10, 6)
    fast = optimize(model, (x,))
    (network,) = fast._networks.values()
    done = next(r for r in network.reports if r.name == "winograd_convolutions")
    assert (done.matched, done.candidates) == (matched, 4)
    assert done.left["not 3x3 with stride 1 and padding 1"] == 1
    assert done.left["channels in groups or not in sixteens"] == 1
    assert distance(fast(x), model(x)) < TILED
    for p in model.parameters():
        p.mul_(-1.25)
    fast.refresh()
    assert distance(fast(x), model(x)) < TILED


@torch.no_grad()
def test_bfloat16_is_left_to_the_direct_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SECONDS, lambda *_: (2.0, 1.0))
    monkeypatch.setattr("stepfuse.engine.passes.network.pays", lambda *_: True)
    fast = optimize(Body().eval(), (torch.randn(2, 16, 10, 6),), dtype=torch.bfloat16)
    assert "winograd_convolutions  0 of 4" in fast.explain()


@torch.no_grad()
def test_the_shapes_are_measured() -> None:
    from stepfuse.engine.passes.winograd_convolutions import _seconds

    direct, tiled = _seconds((1, 16, 5, 7), 16, torch.get_num_threads())
    assert 0 < direct < 1
    assert 0 < tiled < 1
