"""The rivals on a GPU, as far as they can be seen without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.bench.fake_graphs import FakeCuda
from torch import Tensor, nn

from stepfuse.bench import cuda_peers
from stepfuse.bench.cuda_peers import WARM_UP

X, T = torch.randn(2, 3, 4, 4), torch.tensor([5, 5])


class Double(nn.Module):
    """2 x + t, into memory of its own, as a graph has it."""

    def __init__(self, api: FakeCuda) -> None:
        super().__init__()
        self.api, self.result = api, torch.zeros_like(X)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        def work() -> None:
            self.result.copy_(2 * x + t.view(-1, 1, 1, 1))

        self.api.launched(work)
        return self.result


def test_a_graph_is_fed_through_its_own_buffers() -> None:
    api = FakeCuda()
    call = cuda_peers.graphed(Double(api), X, T, api)
    assert api.log == [
        "on cpu",
        "side waits for current",
        *["launched"] * WARM_UP,
        "current waits for side",
        "captured",
        "off cpu",
    ]
    api.log.clear()
    for value in (3.0, -1.0):
        x = torch.full_like(X, value)
        assert torch.equal(call(x, T + 1), 2 * x + 6)
        assert torch.equal(x, torch.full_like(X, value))
    assert api.log == ["replay", "replay"]


@pytest.mark.parametrize(
    ("build", "mode"),
    [
        (cuda_peers.max_autotune, "max-autotune"),
        (cuda_peers.reduce_overhead, "reduce-overhead"),
    ],
)
def test_the_modes_of_torch_compile(build: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, warmed up and captured when it is built; every call begins a new iteration."""
    asked: list[Any] = []
    events: list[str] = []

    def compile_(model: Any, **settings: Any) -> Any:
        asked.append(settings)
        return lambda x, t: events.append("call") or model(x, t)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: events.append("step"))
    call = build(Double(FakeCuda()), X, T)
    assert asked == [{"mode": mode, "dynamic": False}]
    assert events == ["step", "call"] * WARM_UP
    assert torch.equal(call(X, T), 2 * X + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_and_layout_of_a_rival(dtype: torch.dtype) -> None:
    """Weights of a copy, images on the way in, and float32 on the way out."""
    seen: list[Tensor] = []

    def build(model: nn.Module, x: Tensor, t: Tensor) -> Any:
        seen.extend([x, *model.parameters()])
        return lambda x, t: seen.append(x) or model(x)

    model = nn.Conv2d(3, 8, 3)
    result = cuda_peers.channels_last(build, dtype)(model, X, T)(X, T)
    assert result.dtype is torch.float32
    example, weight, _, image = seen
    assert {tensor.dtype for tensor in seen} == {dtype}
    for tensor in (example, weight, image):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.dtype is torch.float32
    assert weight is not model.weight
    torch.testing.assert_close(result, model(X), rtol=0.02, atol=0.02)
