"""The network inside a library's loop: compiled, and itself where it must be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stepfuse.engine.adapters.network import FastNetwork
from stepfuse.engine.compile.optimize import Optimized

NEAR = 1e-6  # float32 in another order


class Small(nn.Module):
    """A convolution and a timestep's bias."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.time = nn.Linear(1, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        bias = self.time(t[:, None].to(x.dtype) / 100)
        return self.dropout(self.convolution(x) + bias[..., None, None])


def check(network: FastNetwork, times: list[int], dtype: torch.dtype = torch.float32) -> Optimized:
    """What is ready is compiled and gives what the model gives."""
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        fast = network.ready(times)
        assert isinstance(fast, Optimized)
        for t in times:
            at = torch.full((2,), t)
            torch.testing.assert_close(fast(x, at), network.model(x, at), rtol=NEAR, atol=NEAR)
    return fast


def test_compiled_and_announced() -> None:
    network = FastNetwork(Small(), True, None)
    first = check(network, [3, 9])
    assert check(network, [9, 4]) is first
    assert set(first.timesteps) == {3, 4, 9}
    assert "timesteps              3 announced" in network.explain()


@pytest.mark.parametrize("times", [[5000], [4096, 3], [3, 4095, 4096]])
def test_timesteps_that_no_table_holds(times: list[int]) -> None:
    """All of a loop's timesteps are announced, or none: a table must not lack one."""
    network = FastNetwork(Small(), True, None)
    check(network, [7])
    assert check(network, times).timesteps == []
    assert check(network, [7]).timesteps == []


def test_weights_and_dtypes_that_change() -> None:
    network = FastNetwork(Small(), True, None)
    first = check(network, [1])
    with torch.no_grad():
        network.model.convolution.weight.mul_(2)
    assert check(network, [1]) is first
    network.model.double()
    assert check(network, [1], torch.float64) is not first


def test_itself() -> None:
    """With gradients on, with dropout on, as a function, or as asked."""
    model = Small(dropout=0.5)
    network = FastNetwork(model, True, None)
    assert network.ready([1]) is model  # gradients are on
    with torch.no_grad():
        assert network.ready([1]) is model
        assert "dropout is on" in network.explain()
        model.eval()
        assert network.ready([1]) is not model
        function = lambda x, t: x  # noqa: E731
        assert FastNetwork(function, True, None).ready([1]) is function
        plain = FastNetwork(model, False, None)
        assert plain.ready([1]) is model
        assert plain.explain() == "as it is: optimize=False"


def test_hooks_autocast_and_batch_statistics() -> None:
    """What a compiled network would pass over."""
    network, seen = FastNetwork(Small(), True, None), []
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    hook = network.model.convolution.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        network.ready([1])(x, t)
        assert seen == [1]
        assert network.explain() == "as it is: a module has a forward hook"
        hook.remove()
        assert network.ready([1]) is not network.model
        with torch.autocast("cpu", torch.bfloat16):
            assert network.ready([1]) is network.model
            assert network.explain() == "as it is: autocast is on"
        network.model.add_module("norm", nn.BatchNorm2d(3))
        assert network.ready([1]) is network.model
        network.model.eval()
        assert network.ready([1]) is not network.model


def test_options_go_to_another_model() -> None:
    network = FastNetwork(Small(), True, torch.bfloat16)
    assert network.of(network.model) is network
    other = network.of(Small())
    with torch.no_grad():
        assert other.ready([]).dtype is torch.bfloat16
    copied = copy.deepcopy(network)
    assert copied.model is not network.model
