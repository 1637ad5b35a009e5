"""Models that must not be captured, and what a guidance holds beside the model."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.replay.capture import CaptureRefused
from stepfuse.engine.sampling import program_cache
from stepfuse.engine.sampling.lint import check_capturable

SCHEDULE, SHAPE = sf.Schedule.linear(), (2, 3, 4, 4)
REASON = "Waiting asks for it (capturable=False): it waits for another process"


class Waiting(nn.Module):
    """Works in an eager step, and in no captured one."""

    capturable = False
    uncapturable_because = "it waits for another process"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5


class Holding(nn.Module):
    """Has it deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Waiting()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.blocks[1](self.blocks[0](x), t)
        return out


def function() -> Callable[..., Tensor]:
    waiting = Waiting()
    return lambda x, t: waiting(x, t)


MODELS: dict[str, Callable[[], Any]] = {
    "module": Waiting,
    "inside": Holding,
    "function": function,
    "partial": lambda: functools.partial(Waiting(), t=None),
    "method": lambda: Waiting().forward,
}


@pytest.fixture(autouse=True)
def _no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever captures nevertheless is told so."""

    def never(*_: Any) -> None:
        pytest.fail("a capture was entered")

    monkeypatch.setattr(program_cache, "Recording", never)
    monkeypatch.setattr(program_cache, "CudaGraph", never)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "partial"])
def test_the_sampler_runs_it_eagerly_and_says_why(name: str) -> None:
    sampler = sf.Sampler(MODELS[name](), SCHEDULE, steps=3)
    assert sampler.sample(SHAPE).isfinite().all()
    stats = sampler.stats()
    assert (stats["eager_steps"], stats["captures"]) == (3, 0)
    assert f"refused, steps run eagerly: {REASON}" in sampler.explain()


@pytest.mark.parametrize("name", MODELS)
def test_the_lint_says_the_same(name: str) -> None:
    with pytest.raises(CaptureRefused) as caught:
        check_capturable(sf.Sampler(MODELS[name](), SCHEDULE), SHAPE)
    assert str(caught.value) == REASON


@pytest.mark.parametrize("again", [copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_do_so_too(again: Any) -> None:
    sampler = again(sf.Sampler(Holding(), SCHEDULE, steps=2))
    sampler.sample(SHAPE)
    assert sampler.stats()["eager_steps"] == 2


def test_without_a_reason() -> None:
    model = nn.Identity()
    model.capturable = False  # type: ignore[assignment]
    sampler = sf.Sampler(lambda x, t: model(x), SCHEDULE, steps=1)
    sampler.sample(SHAPE)
    said = "refused, steps run eagerly: Identity asks for it (capturable=False)"
    assert sampler.explain().endswith(said)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("capturable", "no", "capturable of the model must be True or False; got"),
        ("uncapturable_because", 3, "uncapturable_because of the model must be a text; got int 3"),
    ],
)
def test_what_it_can_say(name: str, value: Any, message: str) -> None:
    model = Holding()
    setattr(model.blocks[0], name, value)
    with pytest.raises(TypeError, match=message):
        sf.Sampler(model, SCHEDULE)


def test_a_guidance_that_evaluates_such_a_model() -> None:
    waiting = Waiting()
    guidance = sf.ClassifierGuidance(lambda x, t: -waiting(x, t).square().sum((1, 2, 3)), 1.0)
    sampler = sf.Sampler(lambda x, t: x * 0.5, SCHEDULE, steps=2, guidance=guidance)
    sampler.sample(SHAPE)
    assert f"refused, steps run eagerly: {REASON}" in sampler.explain()
    with pytest.raises(CaptureRefused, match="asks for it"):
        check_capturable(sampler, SHAPE)


class Classifier(nn.Module):
    """log p(y | x) from a linear layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 1)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(x.flatten(1))[:, 0] * self.scale


class Second:
    """A guidance with a network of its own, in an attribute."""

    evaluations = 2

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        first: Tensor = denoiser(x, t, condition)
        return first + self.network(x, t).view(-1, 1, 1, 1)


def guided_by(kind: str, network: nn.Module) -> Any:
    return {
        "module": lambda: sf.ClassifierGuidance(network, 1.0),
        "function": lambda: sf.ClassifierGuidance(lambda x, t: network(x, t), 1.0),
        "method": lambda: sf.ClassifierGuidance(network.forward, 1.0),
        "attribute": lambda: Second(network),
    }[kind]()


@pytest.mark.parametrize("kind", ["module", "function", "method", "attribute"])
def test_the_lint_takes_the_modules_of_a_guidance_along(kind: str) -> None:
    network = Classifier()
    before = [*network.parameters(), *network.buffers()]
    guidance = guided_by(kind, network)
    sampler = sf.Sampler(lambda x, t: x * 0.5, SCHEDULE, steps=2, guidance=guidance)
    check_capturable(sampler, SHAPE)
    after = [*network.parameters(), *network.buffers()]
    assert [id(tensor) for tensor in before] == [id(tensor) for tensor in after]
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_module_somewhere_else_is_a_mistake() -> None:
    """Where the sampler is on the CPU and the network of its guidance is not."""
    sampler = sf.Sampler(
        lambda x, t: x * 0.5, SCHEDULE, steps=2, guidance=Second(Classifier().to("meta"))
    )
    with pytest.raises(CaptureRefused):
        check_capturable(sampler, SHAPE)


def test_a_tensor_of_a_guidance_on_the_cpu_is_named() -> None:
    class Shifted(Second):
        def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
            first: Tensor = denoiser(x, t, condition)
            return first + shift

    shift = torch.ones(SHAPE)
    sampler = sf.Sampler(lambda x, t: x * 0.5, SCHEDULE, guidance=Shifted(nn.Identity()))
    with pytest.raises(CaptureRefused):
        check_capturable(sampler, SHAPE)


def test_onnx_on_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the buffer that stands for its device is needed to ask it."""
    denoiser = sf.OnnxDenoiser.__new__(sf.OnnxDenoiser)
    nn.Module.__init__(denoiser)
    denoiser.register_buffer("like_x", torch.empty(0), persistent=False)
    assert denoiser.capturable
    on_cuda = type("OnCuda", (), {"device": torch.device("cuda", 0)})()
    denoiser._buffers["like_x"] = on_cuda  # type: ignore[assignment]
    assert not denoiser.capturable
    assert "waits for the GPU" in denoiser.uncapturable_because
