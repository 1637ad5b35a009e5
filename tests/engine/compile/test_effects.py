"""What another run of a network would do once more, for which it is not captured."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.emulated_graphs import EmulatedGraphs
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import optimize


class Noisy(nn.Module):
    """Draws numbers at every call."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * 2 + torch.randn_like(x) * t.reshape(-1, 1, 1, 1)


class Counting(nn.Module):
    """Writes to a buffer at every call, on the way to its result."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.calls.add_(1) * t.reshape(-1, 1, 1, 1)


class Overwriting(nn.Module):
    """Writes to its argument."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x[:, :1].mul_(2) + t.reshape(-1, 1, 1, 1)


class InPlace(nn.Module):
    """Writes to what it has made."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x * 2)[:, :1].mul_(3) + t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", [Noisy, Counting, Overwriting])
def test_what_a_second_run_would_do_again_is_not_captured(
    kind: type[nn.Module], graphs: EmulatedGraphs
) -> None:
    model = kind().eval()
    x, t = torch.randn(2, 3, 4, 5), torch.tensor([1, 2])
    fast, other = optimize(model, (x.clone(), t)), copy.deepcopy(model)
    results = []
    for one in (fast, other):
        torch.manual_seed(0)
        results.append([one(x.clone(), t) for _ in range(3)])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected)
    assert not graphs.made
    assert "operator by operator" in fast.explain()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_draws_numbers_where_it_drops(dropout: float, graphs: EmulatedGraphs) -> None:
    class Attending(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout)

    x, t = torch.randn(2, 3, 4, 8), torch.tensor([1, 2])
    fast = optimize(Attending(), (x, t), without=["attention"])
    fast(x, t)
    assert len(graphs.made) == (dropout == 0)


def test_writing_to_what_it_has_made_is_captured(graphs: EmulatedGraphs) -> None:
    x, t = torch.randn(2, 3, 4, 5), torch.tensor([1, 2])
    fast = optimize(InPlace(), (x, t))
    for image in (x, -x):
        assert torch.allclose(fast(image, t), InPlace()(image, t))
    assert [graph.replays for graph in graphs.made] == [2]
