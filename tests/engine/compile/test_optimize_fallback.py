"""What runs where there is no graph, and that finding it out changes nothing."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.compile.networks import distance
from tests.engine.compile.odd_modules import Branching, conv
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import optimize

# float32 sums in another order, through a few layers
REORDERED = 1e-5


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 6, 8), torch.tensor([5, 7])


class Shifted(Branching):
    """Has a buffer, and a layer that only a plain list knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.rand(4, 1, 1))
        self.hidden = [conv()]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.hidden[0](super().forward(x, t) + self.shift)


def assign(model: Any) -> None:
    other = Shifted()
    model.load_state_dict(other.state_dict(), assign=True)


def weight(model: Any) -> None:
    model.c1.weight = nn.Parameter(torch.randn(4, 4, 3, 3))


def no_bias(model: Any) -> None:
    model.c1.bias = None


def buffer(model: Any) -> None:
    model.shift = torch.rand(4, 1, 1)


def hidden(model: Any) -> None:
    model.hidden[0].weight = nn.Parameter(torch.randn(4, 4, 3, 3))


@pytest.mark.parametrize("replace", [assign, weight, no_bias, buffer, hidden])
@torch.no_grad()
def test_what_is_replaced_is_taken_over(replace: Callable[[Any], None]) -> None:
    model, given = Shifted().eval(), inputs()
    fast = optimize(model, given)
    assert "no graph" in fast.explain()
    before = fast(*given)
    replace(model)
    expected = model(*given)
    assert distance(before, expected) > 1e-2
    assert distance(fast(*given), expected) < REORDERED


class InPlace(nn.Module):
    """Writes to a buffer, to a plain tensor, to a weight and to its input, and has no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.plain = torch.zeros(1)
        self.conv = conv()
        self.table = nn.Embedding(8, 4, max_norm=0.1)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        self.calls += 1
        self.plain.add_(1)
        x.mul_(2)
        if x.sum() == 12345:
            return x
        row = torch.as_tensor(t).reshape(-1)
        return self.conv(x) + self.table(row)[:, :, None, None] + self.calls


@pytest.mark.parametrize("t", [5, torch.tensor([5, 7])], ids=["number", "tensor"])
@torch.no_grad()
def test_finding_out_changes_nothing(t: Any) -> None:
    model, x = InPlace().eval(), torch.randn(2, 4, 6, 8)
    before, given = copy.deepcopy(model), x.clone()
    versions = [held._version for held in (*model.parameters(), *model.buffers(), model.plain)]
    fast = optimize(model, (given, t))
    held = (*model.parameters(), *model.buffers(), model.plain)
    for now, old in zip(held, (*before.parameters(), *before.buffers(), before.plain), strict=True):
        assert torch.equal(now, old)
    assert [one._version for one in held] == versions
    assert torch.equal(given, x)
    for _ in range(3):
        ours, own = x.clone(), x.clone()
        assert distance(fast(ours, t), before(own, t)) < REORDERED
        assert torch.equal(ours, own)
    assert model.calls == before.calls == model.plain == 3
    assert "eval()" not in fast.explain()


class Failing(InPlace):
    def forward(self, x: Tensor, t: Any) -> Tensor:
        super().forward(x, t)
        raise LookupError("of its own")


@pytest.mark.parametrize("t", [5, torch.tensor([5, 7])], ids=["number", "tensor"])
@torch.no_grad()
def test_a_failure_of_the_model_changes_nothing_either(t: Any) -> None:
    model, x = Failing().eval(), torch.randn(2, 4, 6, 8)
    given = x.clone()
    with pytest.raises(LookupError, match="of its own"):
        optimize(model, (given, t))
    assert torch.equal(given, x)
    assert model.calls == model.plain == 0


def python() -> float:
    return random.random()


def legacy() -> float:
    return float(np.random.rand())  # noqa: NPY002


_GENERATOR = np.random.default_rng(0)
_COUNT = itertools.count(1)


def of_a_file() -> float:
    return float(_GENERATOR.random())


def counted() -> float:
    return float(next(_COUNT))


class Drawing(nn.Module):
    """Multiplies by what ``draw`` hands out."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.conv, self.draw = conv(), draw

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.conv(x) * self.draw() + torch.as_tensor(t).reshape(-1, 1, 1, 1)


class Held(Drawing):
    """Its generator is an attribute."""

    def __init__(self, generator: Any, name: str) -> None:
        super().__init__(python)
        self.generator, self.name = generator, name

    def forward(self, x: Tensor, t: Any) -> Tensor:
        drawn = getattr(self.generator, self.name)()
        return self.conv(x) * float(drawn) + torch.as_tensor(t).reshape(-1, 1, 1, 1)


def fresh(kind: str) -> nn.Module:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    _GENERATOR.bit_generator.state = np.random.default_rng(0).bit_generator.state
    torch.manual_seed(0)
    made: dict[str, Callable[[], nn.Module]] = {
        "python": lambda: Drawing(python),
        "numpy": lambda: Drawing(legacy),
        "numpy of a file": lambda: Drawing(of_a_file),
        "numpy held": lambda: Held(np.random.default_rng(0), "random"),
        "numpy's older held": lambda: Held(np.random.RandomState(0), "rand"),
        "python held": lambda: Held(random.Random(0), "random"),
        "method of numpy": lambda: Drawing(np.random.default_rng(0).random),
        "method of python": lambda: Drawing(random.Random(0).random),
        "count held": lambda: Held(itertools.count(1), "__next__"),
        "generator held": lambda: Held(iter([1.0, 2.0, 3.0, 4.0]), "__next__"),
    }
    return made[kind]().eval()


KINDS = ["python", "numpy", "numpy of a file", "numpy held", "numpy's older held", "python held",
         "method of numpy", "method of python", "count held", "generator held"]  # fmt: skip


@pytest.mark.parametrize("t", [5, torch.tensor([5, 7])], ids=["number", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_numbers_are_drawn_at_every_call_and_not_before(kind: str, t: Any) -> None:
    x = torch.randn(2, 4, 6, 8)
    plain = fresh(kind)
    expected = [plain(x, t) for _ in range(3)]
    model = fresh(kind)
    fast = optimize(model, (x, t))
    for exact in expected:
        assert distance(fast(x, t), exact) < REORDERED
    assert not torch.equal(expected[0], expected[1])


@torch.no_grad()
def test_a_count_of_a_file_goes_on() -> None:
    model, given = Drawing(counted).eval(), inputs()
    before = repr(_COUNT)
    fast = optimize(model, given)
    assert repr(_COUNT) == before
    assert not torch.equal(fast(*given), fast(*given))


class Noisy(nn.Module):
    """Draws from PyTorch, and takes any timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return self.conv(x) + torch.randn_like(x) + torch.as_tensor(t).reshape(-1, 1, 1, 1)


def states() -> tuple[Any, ...]:
    """Where the generators for everybody are."""
    of_numpy: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), of_numpy[1].tolist(), of_numpy[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("t", [5, 0.5, torch.tensor([5, 7])], ids=["int", "float", "tensor"])
@pytest.mark.parametrize("kind", [Noisy, lambda: Drawing(python), Branching])
@torch.no_grad()
def test_no_generator_moves(kind: Callable[[], nn.Module], t: Any) -> None:
    model, x = kind().eval(), torch.randn(2, 4, 6, 8)
    before = states()
    optimize(model, (x, t))
    assert states() == before
