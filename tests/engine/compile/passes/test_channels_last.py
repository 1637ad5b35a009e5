"""Images of one channel lie channels-first and channels-last at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import optimize


class Grey(nn.Module):
    """Whose first convolution reads one channel, and whose last one makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(64, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        both = torch.cat([self.second(F.silu(self.norm(h))), h], 1)
        return self.last(both) * t[:, None, None, None]


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_nothing_is_converted_after_the_convolution_of_one_channel(count: int) -> None:
    model = Grey().eval()
    x, t = torch.randn(count, 1, 6, 10), torch.rand(count)
    fast = optimize(model, (x, t))
    found = {report.name: report for report in fast.reports}
    assert found["channels_last"].note == "0 conversions, 0 contiguous() dropped"
    assert "not channels-last" not in found["concatenate"].left
    given = {
        "as it is": x,
        "with strides of channels-last": x.as_strided(x.shape, (60, 1, 10, 1)),
        "transposed": x.mT.contiguous().mT,
        "a part of a larger one": torch.cat([x, x], 1)[:, 1:],
        "a part of its rows": torch.cat([x, x], 2)[:, :, ::2],
    }
    for how, image in given.items():
        y, expected = fast(image, t), model(image, t)
        assert y.is_contiguous(), how
        assert (y - expected).norm() <= 1e-5 * expected.norm(), how
