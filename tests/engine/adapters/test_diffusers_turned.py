"""Filters of a U-Net of diffusers that are turned where they lie, as on CUDA: files, `restore`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.adapters.diffusers_models import least_unet2d, noise
from tests.engine.compile.networks import distance

from stepfuse.engine.adapters.diffusers import accelerate, forward, restore
from stepfuse.engine.compile.optimize import Optimized
from stepfuse.engine.compile.pass_order import PASSES
from stepfuse.engine.compile.passes import channels_last

REORDERED = 5e-6  # float32 sums in another order
PACKING = ("prepack_convolutions", "convolution_forms", "upsampled_convolutions")
X = noise(2, 3, 8, 8)


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Builds accelerated U-Nets that turn their filters, as those on CUDA do."""
    passes = [pass_ for pass_ in PASSES if pass_.__name__ not in PACKING]
    monkeypatch.setattr(channels_last, "turns_filters", lambda device: True)
    monkeypatch.setattr(forward, "Optimized", functools.partial(Optimized, passes=passes))

    def build() -> Any:
        torch.manual_seed(0)
        fast = accelerate(least_unet2d())
        assert not strides(fast)[1]
        with torch.no_grad():
            fast(X, 3)
        assert strides(fast)[1]
        return fast

    return build


def strides(model: Any) -> tuple[list[Any], bool]:
    """Those of all filters, and whether wide ones are channels-last."""
    filters = [p for p in model.parameters() if p.dim() == 4]
    wide = [p for p in filters if p.shape[1] > 1 and p.shape[2] > 1]
    last = {p.is_contiguous(memory_format=torch.channels_last) for p in wide}
    assert len(last) == 1
    return [p.stride() for p in filters], last.pop()


@torch.no_grad()
def test_restore_puts_the_strides_back(turned: Callable[[], Any]) -> None:
    fast = turned()
    torch.manual_seed(0)
    plain = least_unet2d()
    expected = plain(X, 3).sample
    assert distance(fast(X, 3).sample, expected) < REORDERED
    restore(fast)
    assert strides(fast) == strides(plain)
    assert torch.equal(fast(X, 3).sample, expected)


@torch.no_grad()
def test_files_are_what_they_were(turned: Callable[[], Any], tmp_path: Path) -> None:
    fast = turned()
    fast.save_pretrained(tmp_path)
    again = type(fast).from_pretrained(tmp_path)
    assert not strides(again)[1]
    for (name, a), (other, b) in zip(
        fast.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
