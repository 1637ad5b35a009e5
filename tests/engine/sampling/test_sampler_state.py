"""A captured sampler follows whatever its step reads, and tells where it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.compile.optimize import WeightsChanged

SCHEDULE = sf.Schedule.linear()
SHAPE = (2, 4, 8, 8)
# float32 products summed in another order, through the clipped steps of a loop
SAME_IMAGES = 1e-3


class Net(nn.Module):
    """Reads its timestep, a buffer, and a Linear, whose weight is transposed at every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(1, 4)
        self.register_buffer("gain", torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv(x) + self.linear(t.to(x.dtype)[:, None] / 1000)[:, :, None, None]
        return self.gain * torch.tanh(h)


def new_weight(net: Net) -> None:
    net.conv.weight = nn.Parameter(net.conv.weight.detach() * 2)


def new_buffer(net: Net) -> None:
    net.gain = torch.tensor(0.25)


def new_memory(net: Net) -> None:
    net.linear.weight.data = net.linear.weight.detach() + 1


def assigned(net: Net) -> None:
    net.load_state_dict({n: v * 1.5 for n, v in net.state_dict().items()}, assign=True)


CHANGES = pytest.mark.parametrize("change", [new_weight, new_buffer, new_memory, assigned])


class Holder:
    """Of no module's kind."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)


class Listed(nn.Module):
    """Keeps its network where no module finds it."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.nets = [net]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.nets[0](x, t)


class Scored(nn.Module):
    """log p(y | x) of a classifier."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t).square().mean((1, 2, 3))


def pair(build: Callable[[Any], sf.Sampler]) -> tuple[sf.Sampler, sf.Sampler]:
    return build(None), build("step")


def sampler(model: Any, graph: Any = "step", **settings: Any) -> sf.Sampler:
    return sf.Sampler(model, SCHEDULE, graph=graph, **{"steps": 4, **settings})


def classified(score: Callable[[Net], Any]) -> Callable[[Net, Any], sf.Sampler]:
    def build(net: Net, graph: Any) -> sf.Sampler:
        guidance = sf.ClassifierGuidance(score(net), 50.0)
        return sampler(lambda x, t: 0.1 * x, graph, guidance=guidance)

    return build


PLACES: dict[str, Callable[[Net, Any], sf.Sampler]] = {
    "model": sampler,
    "lambda": lambda net, graph: sampler(lambda x, t: net(x, t), graph),
    "method": lambda net, graph: sampler(net.forward, graph),
    "object": lambda net, graph: sampler(Holder(net), graph),
    "list": lambda net, graph: sampler(Listed(net), graph),
    "classifier": classified(Scored),
    "function of a classifier": classified(lambda net: lambda x, t: Scored(net)(x, t)),
}


@CHANGES
@pytest.mark.parametrize("place", PLACES)
def test_replaced_weights_are_in_force_wherever_they_are(
    place: str, change: Callable[[Net], None]
) -> None:
    net = Net()
    eager, captured = pair(lambda graph: PLACES[place](net, graph))
    before = captured.sample(SHAPE)
    assert torch.equal(before, eager.sample(SHAPE))
    assert captured.stats()["eager_steps"] == 0, captured.explain()
    change(net)
    after = captured.sample(SHAPE)
    assert torch.equal(after, eager.sample(SHAPE))
    assert not torch.equal(after, before)
    assert captured.stats()["eager_steps"] == 0, captured.explain()


@CHANGES
@pytest.mark.parametrize("how", ["callback", "iterate"])
def test_replaced_weights_are_in_force_from_the_next_step_on(
    how: str, change: Callable[[Net], None]
) -> None:
    net = Net()
    eager, captured = pair(lambda graph: sampler(net, graph))
    begun = copy.deepcopy(net.state_dict())

    def run(one: sf.Sampler) -> Tensor:
        net.load_state_dict(copy.deepcopy(begun), assign=True)
        if how == "callback":
            return one.sample(SHAPE, callback=lambda s: change(net) if s.index == 1 else None)
        for step in one.iterate(SHAPE):
            if step.index == 1:
                change(net)
        return step.x

    undisturbed = captured.sample(SHAPE)
    expected = run(eager)
    assert torch.equal(run(captured), expected)
    assert not torch.equal(expected, undisturbed)


# --- optimised models inside


def wrapped(fast: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: fast(x, t)


class Inside(nn.Module):
    """A module around an optimised one."""

    def __init__(self, fast: nn.Module) -> None:
        super().__init__()
        self.fast = fast

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.fast(x, t)


def example() -> tuple[Tensor, Tensor]:
    return torch.zeros(SHAPE), torch.tensor([5, 5])


@pytest.mark.parametrize("around", [lambda fast: fast, wrapped, Inside])
def test_changed_weights_of_an_optimised_model_raise_wherever_it_is(around: Any) -> None:
    net = Net().eval()
    captured = sampler(around(sf.optimize(net, example())))
    captured.sample(SHAPE)
    with torch.no_grad():
        net.conv.weight.mul_(3)
    for _ in range(2):
        with pytest.raises(WeightsChanged, match=r"refresh\(\)"):
            captured.sample(SHAPE)
    captured.refresh()
    got, expected = captured.sample(SHAPE), sampler(net, None).sample(SHAPE)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_IMAGES)
    assert captured.stats()["eager_steps"] == 0, captured.explain()


def test_changed_weights_of_an_optimised_model_raise_at_the_next_step() -> None:
    net = Net().eval()
    captured = sampler(wrapped(sf.optimize(net, example())))
    captured.sample(SHAPE)
    steps = captured.iterate(SHAPE)
    next(steps)
    with torch.no_grad():
        net.conv.weight.mul_(3)
    with pytest.raises(WeightsChanged):
        next(steps)


class Folded(Net):
    """Reads a tensor that is no parameter and no buffer, which a pass makes a constant of."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.full((4, 4, 1, 1), 0.3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(nn.functional.conv2d(x, self.w * 2), t)


@pytest.mark.parametrize("around", [lambda fast: fast, wrapped, Inside])
def test_a_tensor_below_an_optimised_model_counts_by_its_content(around: Any) -> None:
    net = Folded().eval()
    captured = sampler(around(sf.optimize(net, example())))
    before = captured.sample(SHAPE)
    net.w.fill_(-0.4)
    got, expected = captured.sample(SHAPE), sampler(net, None).sample(SHAPE)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_IMAGES)
    assert not torch.allclose(got, before, atol=0.1)


def test_a_network_that_was_thrown_out_is_not_replayed() -> None:
    """Nobody refreshes it, and nobody watches its weights."""
    net = Net().eval()
    captured = sampler(sf.optimize(net, example(), max_networks=1))
    captured.sample(SHAPE)
    captured.sample((1, 4, 8, 8))
    with torch.no_grad():
        net.conv.weight.mul_(3)
    captured.refresh()
    got, expected = captured.sample(SHAPE), sampler(net, None).sample(SHAPE)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_IMAGES)


# --- inference mode


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("graph", [None, "step"])
def test_what_was_made_in_inference_mode_serves_outside_and_back(
    graph: Any, optimize: bool
) -> None:
    net = Net().eval()
    guidance = sf.CFG(2.0, {"by": 0.5})

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor, by: Tensor) -> Tensor:
            return self.net(x, t) * by[:, None, None, None]

    def build(graph: Any, optimize: bool) -> sf.Sampler:
        model = Conditional().eval()
        return sampler(model, graph, eta=0.5, guidance=guidance, optimize=optimize)

    one = build(graph, optimize)
    condition = {"by": torch.tensor([1.0, 2.0])}
    expected = build(None, False).sample(SHAPE, condition=condition)
    for inside in (True, False, True, False):
        with torch.inference_mode(inside):
            got = one.sample(SHAPE, condition=condition)
        torch.testing.assert_close(got, expected, rtol=0, atol=SAME_IMAGES)
        one.set_timesteps(4)
    with torch.inference_mode():
        encoded = one.encode(got, condition)
    torch.testing.assert_close(one.encode(got, condition), encoded, rtol=0, atol=SAME_IMAGES)


@pytest.mark.parametrize("timesteps", [(), (5, 7)])
def test_networks_made_in_inference_mode_can_be_refreshed_outside(timesteps: Any) -> None:
    net = Net().eval()
    x, t = torch.randn(SHAPE), torch.tensor([5, 7])
    with torch.inference_mode():
        fast = sf.optimize(net, (torch.zeros(SHAPE), torch.tensor([5, 5])), timesteps=timesteps)
        fast(x, t)
    with torch.no_grad():
        net.conv.weight.mul_(2)
        net.linear.weight.mul_(2)
        fast.refresh()
        torch.testing.assert_close(fast(x, t), net(x, t), rtol=0, atol=1e-5)
    fast.prepare([9])


# --- steps that change what they read


class Writing(Net):
    """Writes to itself in every call, or in the first alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.calls = 0
        self.kept: Any = None
        self.seen: list[Tensor] = []
        self.step = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        if self.how == "counter":
            self.calls += 1
        if self.how == "feature":
            self.kept = out
        if self.how == "list":
            self.seen.append(out)
        if self.how == "once" and self.kept is None:
            self.kept = torch.full((1,), 0.5)
        if self.how == "once":
            out = out * self.kept
        return out * (1 + self.step * 0)


@pytest.mark.parametrize(
    ("how", "named"), [("counter", "calls"), ("feature", "kept"), ("list", "seen")]
)
def test_a_step_that_changes_its_own_state_runs_eagerly(how: str, named: str) -> None:
    model = Writing(how)
    eager, captured = pair(lambda graph: sampler(model, graph, steps=6))
    expected = eager.sample(SHAPE)
    feature = model.kept
    assert torch.equal(captured.sample(SHAPE), expected)
    assert captured.stats()["captures"] == 0
    assert captured.stats()["eager_steps"] == 6
    assert f"the step itself changes model.{named}" in captured.explain()
    if how == "feature":
        assert torch.equal(model.kept, feature)
    calls = model.calls
    captured.sample(SHAPE)
    assert model.calls == calls + (6 if how == "counter" else 0), "as eager steps would"


def test_what_a_step_builds_once_and_keeps_is_no_change() -> None:
    eager, captured = pair(lambda graph: sampler(Writing("once"), graph, steps=6))
    assert torch.equal(captured.sample(SHAPE), eager.sample(SHAPE))
    assert captured.stats()["captures"] == 1
    assert captured.stats()["eager_steps"] == 0, captured.explain()


@pytest.mark.parametrize("when", ["calls", "steps"])
def test_what_changes_again_and_again_is_not_captured_again_and_again(when: str) -> None:
    model = Writing("nothing")
    eager, captured = pair(lambda graph: sampler(model, graph, steps=20 if when == "steps" else 2))
    if when == "steps":
        captured.sample(SHAPE, callback=lambda _: setattr(model, "step", model.step + 1))
    else:
        for _ in range(20):
            captured.sample(SHAPE)
            model.step += 1
    assert captured.stats()["captures"] == 9
    assert "model.step changed 9 times" in captured.explain()
    assert torch.equal(captured.sample(SHAPE), eager.sample(SHAPE))
    captured.reset()
    captured.sample(SHAPE)
    assert captured.stats()["captures"] == 10, "reset() begins anew"
