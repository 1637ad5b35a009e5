"""What a forward reads beside tensors: every kind of change is seen, and nothing else is."""

from __future__ import annotations

import argparse
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepfuse import Sampler, Schedule
from stepfuse.engine.compile.optimize import WeightsChanged, optimize
from stepfuse.engine.compile.state.python_state import PythonState

GAIN = 1.0
SETTINGS = {"gain": 1.0}


def helper(x: Tensor) -> Tensor:
    return x * GAIN * SETTINGS["gain"]


def attributed(x: Tensor) -> Tensor:
    scale: float = attributed.scale  # type: ignore[attr-defined]
    return x * scale


attributed.scale = 1.0  # type: ignore[attr-defined]


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Processor:
    """An object without a framework, as attention processors are."""

    def __init__(self) -> None:
        self.scale, self.scales = 1.0, [1.0, 1.0]

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale * self.scales[1]


class Louder(Processor):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Inner(nn.Module):
    power = 1

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.processor, self.scaling, self.active = Processor(), {"a": 1.5}, ("a",)
        self.table, self.array = torch.ones(3, 1, 1), np.ones(2)
        self.merged: set[str] = set()
        self.slotted, self.namespace = Slotted(), argparse.Namespace(scale=1.0)
        self.hidden = [nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, bias=False)]
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.processor(self.conv(x)) * self.table
        for name in self.active:
            x = x * self.scaling[name] + len(self.merged)
        for layer in self.hidden:
            x = layer(x)
        x = attributed(x) * self.slotted.scale * self.namespace.scale
        if self.mask is not None:
            x = x * self.mask
        return helper(x) ** self.power * float(self.array[0])


def model_with_everything() -> Any:
    model = nn.Module()
    model.inner = Inner()
    model.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Identity(), nn.Conv2d(3, 3, 1)])
    model.layers[2].weight = model.layers[0].weight
    hook = model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)

    def exchange_hook() -> None:
        hook.remove()
        model.layers[0].register_forward_hook(lambda module, args, out: out * 0.5)

    offset = [0.0]
    factor = 1.0

    def scaled(x: Tensor, t: Tensor) -> Tensor:
        for layer in model.layers:
            x = layer(x)
        return model.inner(x) * factor + offset[0]

    def set_factor(value: float) -> None:
        nonlocal factor
        factor = value

    model.forward = scaled
    model.offset, model.set_factor, model.exchange_hook = offset, set_factor, exchange_hook
    return model.eval()


def put_over(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x: x * 2, module)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute of an object": lambda m: setattr(m.inner.processor, "scale", 0.5),
    "an entry of its list": lambda m: m.inner.processor.scales.__setitem__(1, 0.5),
    "another object": lambda m: setattr(m.inner, "processor", lambda x: x * 3),
    "an entry of a dict": lambda m: m.inner.scaling.__setitem__("a", 0.5),
    "a dict with equal keys": lambda m: setattr(m.inner, "scaling", {"a": 0.5}),
    "a tuple": lambda m: setattr(m.inner, "active", ("a", "a")),
    "a set": lambda m: m.inner.merged.add("a"),
    "an element of an array": lambda m: m.inner.array.__setitem__(0, 2.0),
    "another tensor": lambda m: setattr(m.inner, "table", torch.zeros(3, 1, 1)),
    "a setting of a layer": lambda m: setattr(m.inner.conv, "padding_mode", "circular"),
    "a layer more": lambda m: m.layers.append(nn.SiLU()),
    "another layer": lambda m: m.layers.__setitem__(1, nn.SiLU()),
    "a hook": lambda m: m.inner.register_forward_hook(lambda module, args, out: out * 2),
    "a method put over another": lambda m: put_over(m.layers[1]),
    "an attribute over that of the class": lambda m: setattr(m.inner, "power", 2),
    "what a closure holds": lambda m: m.offset.__setitem__(0, 1.0),
    "a variable of a closure": lambda m: m.set_factor(3.0),
    "another hook in the place of one": lambda m: m.exchange_hook(),
    "the order of layers": lambda m: m.layers._modules.update({"0": m.layers._modules.pop("0")}),
    "another class": lambda m: setattr(m.inner.processor, "__class__", Louder),
    "a slot": lambda m: setattr(m.inner.slotted, "scale", 0.5),
    "a namespace": lambda m: setattr(m.inner.namespace, "scale", 0.5),
    "an attribute of a function": lambda m: setattr(attributed, "scale", 0.5),
    "a weight of a module that is not registered": lambda m: m.inner.hidden[0].weight.data.mul_(3),
    "an unregistered module's other weight": lambda m: setattr(
        m.inner.hidden[0], "weight", nn.Parameter(torch.ones(3, 3, 1, 1))
    ),
    "a bias where there was none": lambda m: setattr(
        m.inner.hidden[1], "bias", nn.Parameter(torch.ones(3))
    ),
    "one of two places of a weight": lambda m: setattr(
        m.layers[2], "weight", nn.Parameter(torch.ones(3, 3, 1, 1))
    ),
    "a buffer where there was none": lambda m: setattr(m.inner, "mask", torch.rand(3, 1, 1)),
}


def inputs() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 5, 4), torch.tensor([3, 4])


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_is_seen_and_followed(name: str) -> None:
    model, given = model_with_everything(), inputs()
    fast, before = optimize(model, given), model(*given)
    state = PythonState({"model": model})
    assert state.holds()
    assert not list(state.changes())
    CHANGES[name](model)
    assert not state.holds()
    assert list(state.changes()), "it can be named"
    after = model(*given)
    assert not torch.allclose(after, before)
    assert torch.allclose(fast(*given), after, atol=1e-5)
    attributed.scale = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a global", "an entry of a global dict", "a class attribute"])
@torch.no_grad()
def test_what_lies_outside_the_model_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = model_with_everything(), inputs()
    fast, before = optimize(model, given), model(*given)
    if name == "a global":
        monkeypatch.setitem(globals(), "GAIN", 2.0)
    elif name == "an entry of a global dict":
        monkeypatch.setitem(SETTINGS, "gain", 2.0)
    else:
        monkeypatch.setattr(Inner, "power", 2)
    after = model(*given)
    assert not torch.allclose(after, before)
    assert torch.allclose(fast(*given), after, atol=1e-5)


class WithoutDefault(dict[str, float]):
    """A dict whose ``get`` takes a name alone, as the registry of transformers' models does."""

    def get(self, name: str) -> float | None:  # type: ignore[override]
        return dict.get(self, name)


def test_a_dict_with_a_get_of_its_own() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.settings = WithoutDefault(gain=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.settings["gain"]

    model = Model()
    state = PythonState({"model": model})
    assert not list(state.changes())
    model.settings["gain"] = 2.0
    assert list(state.changes()) == ["model.settings.gain"]


@torch.no_grad()
def test_a_weight_that_is_gone_is_named_and_then_left_out() -> None:
    model, given = model_with_everything(), inputs()
    fast = optimize(model, given)
    model.inner.conv.bias = None
    with pytest.raises(WeightsChanged, match=r"inner\.conv\.bias"):
        fast(*given)
    fast.refresh()
    assert torch.allclose(fast(*given), model(*given), atol=1e-5)


@torch.no_grad()
def test_a_state_that_comes_back_is_not_compiled_again() -> None:
    model, given = model_with_everything(), inputs()
    fast = optimize(model, given)
    for scale in (0.5, 1.0, 0.5, 1.0):
        model.inner.processor.scale = scale
        assert torch.allclose(fast(*given), model(*given), atol=1e-5)
    assert len(fast.networks) == 2


@torch.no_grad()
def test_a_number_that_never_rests_is_not_compiled_for_ever() -> None:
    model, given = model_with_everything(), inputs()
    fast = optimize(model, given)
    for i in range(14):
        model.inner.processor.scale = float(i + 2)
        assert torch.allclose(fast(*given), model(*given), rtol=1e-4, atol=1e-5)
    assert "model.inner.processor.scale changed" in fast.explain()
    assert len(fast.networks) <= fast.max_networks


@torch.no_grad()
def test_what_the_forward_does_not_read_by_name_compiles_once() -> None:
    """A trainer's counters and logs that hang on the model, flags, and gradients."""
    model, given = model_with_everything(), inputs()
    model.log, model.seen = [], 0
    fast = optimize(model, given)
    model.train()
    model.requires_grad_(False)
    for i in range(3):
        fast(*given)
        model.log.append(i)
        model.seen += 1
        model.inner.last_loss = 0.1 * i
    model.eval()
    fast(*given)
    assert len(fast.networks) == 1


class Caching(nn.Module):
    """Builds what it needs where nobody looks: in its class, in a function of it, in slots."""

    tables: dict[int, Tensor] = {}  # noqa: RUF012  (of the class, as users write it)

    def __init__(self) -> None:
        super().__init__()
        self.kept = Slotted()

    @staticmethod
    @functools.lru_cache
    def ramp(count: int) -> Tensor:
        return torch.linspace(-1, 1, count)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        width = x.shape[-1]
        if width not in self.tables:
            self.tables[width] = torch.linspace(0, 1, width)
        if self.kept.scale == 1.0:
            self.kept.scale = torch.full((1,), 2.0)
        return x * self.tables[width] + self.ramp(width) * self.kept.scale


@torch.no_grad()
def test_nothing_without_data_stays_where_nobody_looks() -> None:
    model, given = Caching(), inputs()
    fast = optimize(model, given)
    assert not Caching.tables
    assert model.kept.scale == 1.0
    expected = model(*given)
    assert expected.isfinite().all()
    assert torch.allclose(fast(*given), expected)
    Caching.tables.clear()


class Building(nn.Module):
    """Builds a table once, and reads a setting beside it."""

    def __init__(self, random: bool) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"scale": 1.0}
        self.table, self.random = None, random

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.rand(4) if self.random else torch.arange(4.0)
        step = self.options.setdefault("step", torch.ones(4))
        return (x + self.table * step) * self.options["scale"]


@pytest.mark.parametrize("random", [False, True])
@torch.no_grad()
def test_what_is_built_once_is_watched_like_all_else(random: bool) -> None:
    model, given = Building(random), inputs()
    fast = optimize(model, given)
    first = fast(*given)
    assert torch.equal(fast(*given), first), "drawn once"
    assert torch.equal(model(*given), first) or not random
    for change in (
        lambda: model.options.update(scale=3.0),
        lambda: setattr(model, "table", torch.zeros(4)),
        lambda: model.table.fill_(2.0),
        lambda: model.options.pop("step"),
        lambda: setattr(model, "table", None),
    ):
        change()
        if model.table is not None or not random:
            assert torch.allclose(fast(*given), model(*given))


def by_attribute() -> tuple[Any, Callable[[], None]]:
    class Scaled(nn.Module):
        scale = 1.0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.scale

    model = Scaled()
    return model, lambda: setattr(model, "scale", 0.25)


def by_closure() -> tuple[Any, Callable[[], None]]:
    scale = [1.0]
    return (lambda x, t: x * scale[0]), lambda: scale.__setitem__(0, 0.25)


def by_partial() -> tuple[Any, Callable[[], None]]:
    options = {"scale": 1.0}

    def model(options: dict[str, float], x: Tensor, t: Tensor) -> Tensor:
        return x * options["scale"]

    return functools.partial(model, options), lambda: options.update(scale=0.25)


def by_object() -> tuple[Any, Callable[[], None]]:
    class Model:
        def __init__(self) -> None:
            self.scale = 1.0

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.scale

    model = Model()
    return model, lambda: setattr(model, "scale", 0.25)


@pytest.mark.parametrize("make", [by_attribute, by_closure, by_partial, by_object])
def test_a_captured_sampler_follows_a_number_of_its_model(make: Callable[[], Any]) -> None:
    model, change = make()
    sampler = Sampler(model, Schedule.linear(), steps=3, clip_sample=None)
    before = sampler.sample((1, 3, 4, 4))
    assert torch.equal(sampler.sample((1, 3, 4, 4)), before)
    assert sampler.stats()["captures"] == 1
    change()
    after = sampler.sample((1, 3, 4, 4))
    eager = Sampler(model, Schedule.linear(), steps=3, clip_sample=None, graph=None)
    assert torch.equal(after, eager.sample((1, 3, 4, 4)))
    assert not torch.allclose(after, before)


def test_a_number_changed_between_two_steps_counts_from_the_next_on() -> None:
    results = []
    for graph in ("auto", None):
        model, change = by_attribute()
        sampler = Sampler(model, Schedule.linear(), steps=4, clip_sample=None, graph=graph)
        for step in sampler.iterate((1, 3, 4, 4)):
            if step.index == 1:
                change()
        results.append(step.x)
    assert torch.equal(*results)
