"""`Sampler(device=...)`: where x lies for a model that does not say it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.compile.fake_cuda import fake_cuda
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.sampling.denoiser import Denoiser

SCHEDULE = sf.Schedule.linear()


def half(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are found as if there were CUDA."""
    place = Denoiser.place

    def found(self: Denoiser, device: Any) -> torch.device:
        with fake_cuda():
            return place(self, device)

    monkeypatch.setattr(Denoiser, "place", found)


def build(model: Any = half, **settings: Any) -> sf.Sampler:
    return sf.Sampler(model, SCHEDULE, steps=2, graph=None, **settings)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
@pytest.mark.parametrize("model", [half, nn.Conv2d(1, 1, 1)])
def test_the_device_of_a_model(model: Any, device: Any) -> None:
    assert build(model, device=device).device == torch.device("cpu")


def places(sampler: sf.Sampler) -> set[torch.device]:
    """Where a batch of it lies."""
    with fake_cuda():
        request = sampler._request((2, 1, 4, 4), condition={"labels": torch.zeros(2)})
        (part,) = request.parts(None)
        return {part.x.device, part.seeds.device, part.condition["labels"].device}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("device", "number"), [("cuda", 0), ("cuda:1", 1), (torch.device("cuda", 1), 1)]
)
def test_a_function_around_networks_on_cuda(device: Any, number: int) -> None:
    sampler = build(device=device)
    assert places(sampler) == {sampler.device} == {torch.device("cuda", number)}
    assert f"on cuda:{number}" in sampler.explain()


@pytest.mark.usefixtures("cuda")
def test_weights_have_the_last_word() -> None:
    model = nn.Conv2d(1, 1, 1)
    with fake_cuda():
        model.weight = nn.Parameter(torch.empty(1, 1, 1, 1, device="cuda:1"), requires_grad=False)
    for device in (None, "cuda", "cuda:1"):
        assert build(model, device=device).device == torch.device("cuda", 1)
    for device in ("cuda:0", "cpu"):
        with pytest.raises(ValueError, match=f"of the model's weights, cuda:1; got {device}"):
            build(model, device=device)


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        (0, TypeError, r"device must be a torch\.device or its name; got int 0"),
        ("gpu", ValueError, "device must name a device, 'cpu' or 'cuda:0' say; got 'gpu'"),
        ("meta", ValueError, "device must be one that computes, .* got 'meta'"),
        ("xla:3", ValueError, "device must be one that this machine has; got 'xla:3': "),
    ],
)
def test_what_is_no_device_is_named(device: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(device=device)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "way", [copy.copy, copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))]
)
def test_copies_have_the_device(way: Callable[[Any], Any]) -> None:
    other = way(build(device="cuda:1"))
    assert places(other) == {other.device} == {torch.device("cuda", 1)}
    with pytest.raises(AttributeError, match=r"Sampler\.device cannot be assigned"):
        other.device = torch.device("cpu")
