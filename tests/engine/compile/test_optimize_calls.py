"""Calls with numbers and settings, from states of the model and from modes of PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.compile.networks import distance, small
from tests.engine.compile.odd_modules import conv
from torch import Tensor, nn

from stepfuse.engine.compile.network_cache import NetworkCache
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.weights.released import WeightsReleased

# float32 sums in another order, through some twenty layers
REORDERED = 1e-5


def as_column(t: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)


class Wave(nn.Module):
    """A fast wave of the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.conv(x) * torch.sin(as_column(t, x) * 5)


@pytest.mark.parametrize("kind", [float, np.float16, np.float32, np.float64])
@torch.no_grad()
def test_a_float_of_any_kind_keeps_its_fraction(kind: Any) -> None:
    model, x = Wave().eval(), torch.randn(2, 4, 6, 8)
    fast = optimize(model, (x, kind(0.5)))
    assert "no graph" not in fast.explain()
    for t in (0.5, 0.25, 3.75, 7.0):
        assert distance(fast(x, kind(t)), model(x, kind(t))) < REORDERED
    assert len(fast.networks) == 1


@torch.no_grad()
def test_a_float_keeps_the_precision_of_the_model() -> None:
    model, x = Wave().double().eval(), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    fast = optimize(model, (x, 1 / 3))
    for t in (1 / 3, 0.1, 123.456):
        assert distance(fast(x, t), model(x, t)) < 1e-13  # sums of float64 in another order


class Picky(nn.Module):
    """Takes a tensor for twice the number."""

    def __init__(self, zero: bool) -> None:
        super().__init__()
        self.conv = conv()
        if zero:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        out: Tensor = self.conv(x)
        return out * (as_column(t, x) * 2 if isinstance(t, Tensor) else t)


@pytest.mark.parametrize(("zero", "t"), [(True, 5), (False, 0), (False, 0.0)])
@torch.no_grad()
def test_a_reading_needs_evidence(zero: bool, t: float) -> None:
    """Where results are zero, or the two readings agree at that very timestep, none is shown."""
    model, x = Picky(zero).eval(), torch.randn(2, 4, 6, 8)
    fast = optimize(model, (x, t))
    if zero:
        nn.init.normal_(model.conv.weight)
    for _ in range(2):
        for number in (type(t)(2), type(t)(7)):
            assert distance(fast(x, number), model(x, number)) < REORDERED
        fast.refresh()


@torch.no_grad()
def test_refresh_looks_for_evidence_again() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = conv(), conv()
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

        def forward(self, x: Tensor, t: Any) -> Tensor:
            out: Tensor = self.out(self.conv(x) + as_column(t, x))
            return out

    model, x = Last().eval(), torch.randn(2, 4, 6, 8)
    fast = optimize(model, (x, 5))
    assert "refresh() looks again" in fast.explain()
    nn.init.normal_(model.out.weight)
    assert distance(fast(x, 3), model(x, 3)) < REORDERED
    fast.refresh()
    assert distance(fast(x, 3), model(x, 3)) < REORDERED
    assert "no graph" not in fast.explain()


class Table(nn.Module):
    """An embedding, whose last entry is the largest timestep there is."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(6, 4), conv()

    def forward(self, x: Tensor, t: Any) -> Tensor:
        row = torch.as_tensor(t).reshape(-1)
        return self.conv(x) + self.table(row)[:, :, None, None]


@torch.no_grad()
def test_no_larger_timestep_is_tried() -> None:
    model, x = Table().eval(), torch.randn(2, 4, 6, 8)
    asked: list[int] = []
    model.table.register_forward_pre_hook(lambda module, args: asked.append(int(args[0].max())))
    del asked[:]
    fast = optimize(model, (x, 5))
    assert max(asked, default=0) <= 5
    assert distance(fast(x, 2), model(x, 2)) < REORDERED


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, t: Tensor, *, g: Any = 1.0) -> Tensor:
        out: Tensor = self.conv(x) * (float(np.sum(g)) if isinstance(g, np.ndarray) else g)
        return out


@pytest.mark.parametrize("array", [False, True], ids=["float", "array"])
@torch.no_grad()
def test_a_setting_that_changes_at_every_call_is_not_compiled_for(
    array: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, t = Gained().eval(), torch.randn(2, 4, 6, 8), torch.tensor([5, 7])
    fast = optimize(model, (x, t), max_networks=4)
    made: list[Any] = []
    build = NetworkCache.build
    monkeypatch.setattr(NetworkCache, "build", lambda *a: made.append(a) or build(*a))
    for i in range(40):
        g = np.full(3, i / 10) if array else i / 10
        assert distance(fast(x, t, g=g), model(x, t, g=g)) < REORDERED or i == 0
    assert len(made) <= 9, "eight values, and whatever serves all others"
    assert "an argument changes again and again" in fast.explain()
    fast(x[:1], t[:1], g=0.1)
    assert "no graph" not in fast.explain().split("\n\n")[-1], "other shapes begin anew"
    made.clear()
    for _ in range(3):
        for i in range(20):
            fast(x, t, g=np.full(3, i / 10) if array else i / 10)
    assert not made, "none of the first eight is compiled again"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = small()[0], 1.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.inner(x, t) * self.scale
        return out


@torch.no_grad()
def test_released_weights_name_the_attribute_that_changed() -> None:
    given = small()[1]
    model = Scaled().eval()
    expected = model(*given)
    fast = optimize(model, given, weights="released")
    for i in range(20):  # more than states are kept
        model.scale = 2.0 + i
        with pytest.raises(WeightsReleased, match=r"'model\.scale' changed .* put it back"):
            fast(*given)
    model.scale = 1.0
    assert distance(fast(*given), expected) < REORDERED


class AnyTimestep(nn.Module):
    """Takes a timestep of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()[0]

    def forward(self, x: Tensor, t: Any) -> Tensor:
        out: Tensor = self.inner(x, torch.as_tensor(t).reshape(-1).expand(len(x)))
        return out


@pytest.mark.parametrize("weights", ["kept", "parked"])
@pytest.mark.parametrize("number", [True, False], ids=["number", "tensor"])
@torch.no_grad()
def test_compiled_in_inference_mode_and_used_outside(weights: Any, number: bool) -> None:
    model, x = AnyTimestep().eval(), small()[1][0]
    t = 3 if number else torch.full((len(x),), 3)
    with torch.inference_mode():
        fast = optimize(model, (x.clone(), t), weights=weights, timesteps=[1, 2, 3])
        assert distance(fast(x, t), model(x, t)) < REORDERED
    assert "no graph" not in fast.explain()
    for mode in (False, True, False):
        with torch.inference_mode(mode), torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
            fast.refresh()
            fast.prepare([4 + mode])
            assert distance(fast(x, t), model(x, t)) < REORDERED
