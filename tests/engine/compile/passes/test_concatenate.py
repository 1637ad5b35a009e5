"""Concatenation that keeps images channels-last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import optimize
from stepfuse.kernels.backends import why_not

pytestmark = pytest.mark.skipif(
    bool(why_not("cpp")), reason="needs the C++ module (a C++ compiler)"
)


class Cats(nn.Module):
    """Of channels, of rows, of tokens, and of channels once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = torch.cat([h, h], -3)
        h = self.last(torch.cat([h, h], 2))
        tokens = torch.cat([h.flatten(2), h.flatten(2)], 1)
        return tokens.sum((1, 2)) + torch.cat([h, h], 1).sum((1, 2, 3))


@torch.no_grad()
def test_only_channels_of_images_are_taken() -> None:
    model, x = Cats().eval(), torch.randn(2, 3, 4, 5)
    fast = optimize(model, (x,))
    assert "concatenate            2 of 4; 2 left: not channels of images" in fast.explain()
    assert torch.allclose(fast(x), model(x), rtol=1e-5, atol=1e-4)
