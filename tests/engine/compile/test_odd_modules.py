"""Modules of unusual build: compiled they compute the same, and they stay what they were.

Every module here is looked at before and after `optimize`, and after it failed: parameters, buffers
and attributes are the same objects with the same values, other shapes still run, state_dict still
saves.
"""

from __future__ import annotations

import dataclasses
import io
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import distance
from tests.engine.compile.odd_modules import (
    COMPILED,
    Aliased,
    Branching,
    Counting,
    Keeping,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from stepfuse import Sampler, Schedule
from stepfuse.engine.compile.optimize import Optimized, optimize

# float32 sums in another order
REORDERED = 1e-6


def inputs(n: int = 2, side: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 4, side, side + 1), torch.arange(n) + 5


def everything(obj: Any, seen: dict[int, Any]) -> Iterator[tuple[Any, Any]]:
    """Every object that hangs on a module, with its content as a tuple of objects."""
    if id(obj) in seen or isinstance(obj, (int, float, str, type(None), type, threading.Thread)):
        return
    seen[id(obj)] = obj
    if isinstance(obj, Tensor):
        assert not isinstance(obj, FakeTensor), "a tensor without data was left behind"
        yield obj, obj.detach().clone()
        return
    if isinstance(obj, dict):
        inner = (*obj.keys(), *obj.values())
    elif isinstance(obj, (list, tuple, set)):
        inner = tuple(obj)
    elif isinstance(obj, nn.Module) or dataclasses.is_dataclass(obj):
        inner = tuple(vars(obj).values())
    else:
        return
    yield obj, inner
    for value in inner:
        yield from everything(value, seen)


def assert_same(before: list[tuple[Any, Any]], model: nn.Module) -> None:
    after = list(everything(model, {}))
    assert len(after) == len(before)
    for (old, held), (new, holds) in zip(before, after, strict=True):
        assert old is new
        if isinstance(old, Tensor):
            assert torch.equal(held, holds)
        else:
            assert len(held) == len(holds)
            for a, b in zip(held, holds, strict=True):
                assert a is b or (isinstance(a, (int, float, str)) and a == b)


@pytest.mark.parametrize("kind", COMPILED, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_it_is_compiled_and_stays_what_it_was(kind: Callable[[], nn.Module]) -> None:
    model, given = kind(), inputs()
    before = list(everything(model, {}))
    fast = optimize(model, given)
    result = fast(*given)
    assert_same(before, model)
    assert distance(result, model(*given)) < REORDERED
    assert "no graph" not in fast.explain(), fast.explain()
    model.eval()
    for shape in ((1, 5), (3, 4)):
        other = inputs(*shape)
        assert distance(fast(*other), model(*other)) < REORDERED
    torch.save(model.state_dict(), io.BytesIO())
    assert all(type(v) is not FakeTensor for v in pytree.tree_leaves(model.state_dict()))


@pytest.mark.parametrize("kind", [Counting, Keeping, Branching], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_what_cannot_be_compiled_runs_as_the_original(kind: Callable[[], nn.Module]) -> None:
    model, plain, given = kind().eval(), kind().eval(), inputs()
    plain.load_state_dict(model.state_dict())
    fast = optimize(model, given)
    assert "no graph" in fast.explain()
    for scale in (1, -1, 1):
        x = given[0] * scale
        assert distance(fast(x, given[1]), plain(x, given[1])) < REORDERED
    if isinstance(model, Counting):
        assert model.calls == plain.calls == 3
    if isinstance(model, Keeping):
        assert distance(model.features, plain.features) < REORDERED
        assert len(model.seen) == 3


@pytest.mark.parametrize("kind", [*COMPILED, Branching, Counting], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_it_stays_what_it_was_when_a_trace_fails(
    kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward raises in the middle, at an operator that only a tracer sees."""
    model, given = kind(), inputs()
    model.train()
    silu = torch.nn.functional.silu

    def refuse(x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            raise NotImplementedError("no such operator")
        return silu(x)

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = refuse(self.inner(x, t))
            return out

    outer = Failing()
    before = list(everything(outer, {}))
    fast = optimize(outer, given)
    assert "no graph" in fast.explain()
    assert_same(before, outer)
    outer.eval()
    assert distance(fast(*given), outer(*given)) < REORDERED or kind is Counting


@torch.no_grad()
def test_a_failure_of_the_model_is_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """A size that does not divide: the model's own error, and no word of a tracer."""

    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = (
                nn.Conv2d(4, 4, 3, stride=2, padding=1),
                nn.Upsample(scale_factor=2),
            )

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = torch.cat([x, self.up(self.down(x))], 1)
            return out

    model = Halving().eval()
    odd = (torch.rand(1, 4, 7, 8), torch.tensor([1]))
    with pytest.raises(RuntimeError) as own:
        model(*odd)
    with pytest.raises(RuntimeError) as ours:
        optimize(model, odd)
    assert str(ours.value) == str(own.value)
    assert ours.value.__cause__ is None
    assert ours.value.__suppress_context__
    assert not caplog.records
    fast = optimize(model, (torch.rand(1, 4, 8, 8), torch.tensor([1])))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        fast(*odd)
    assert fast.explain().count("inputs ") == 1, "what failed takes no place"


@pytest.mark.parametrize("shared", [False, True])
def test_threads_compile_and_call_at_once(shared: bool) -> None:
    """Each thread has its own Optimized, or all one; others call the plain model meanwhile."""
    model, given = Aliased().eval(), inputs()
    with torch.no_grad():
        expected = model(*given)
    one = Optimized(model, None, (), 8) if shared else None
    before = list(everything(model, {}))
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def work(i: int) -> None:
        try:
            start.wait()
            with torch.no_grad():
                call = model if i % 4 == 3 else one or optimize(model, given)
                for _ in range(3):
                    error = distance(call(*given), expected)
                    if not error < REORDERED:
                        wrong.append(error)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_same(before, model)


class Scripted(nn.Module):
    """One of its layers is compiled by TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_scripted_modules_run_as_they_are(whole: bool) -> None:
    model: nn.Module = Scripted().eval()
    given = inputs()
    if whole:
        model = torch.jit.trace(model, given)
    fast = optimize(model, given)
    assert torch.equal(fast(*given), model(*given))
    assert "is compiled by TorchScript" in fast.explain()
    samplers = [Sampler(model, Schedule.linear(), steps=2, graph=g) for g in ("auto", None)]
    assert torch.equal(*(sampler.sample((1, 4, 6, 6)) for sampler in samplers))


class Waiting(nn.Module):
    """Stops in the middle of its trace; by torch.export, which records constants as well."""

    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.conv, self.exported = nn.Conv2d(4, 4, 3, padding=1), exported
        self.inside, self.go = threading.Event(), threading.Event()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.exported:
            y = y * torch.tensor([2.0])
        if threading.current_thread() is not threading.main_thread():
            self.inside.set()
            assert self.go.wait(60)
        return y


@pytest.mark.parametrize("exported", [False, True])
@torch.no_grad()
def test_a_trace_is_not_noticed_in_other_threads(exported: bool) -> None:
    model, given = Waiting(exported).eval(), inputs()
    conv, expected = model.conv, model(*given)
    thread = threading.Thread(target=optimize, args=(model, given))
    thread.start()
    assert model.inside.wait(60)
    try:
        for _ in range(3):  # one forward without data, then the tracer's
            assert model.conv is conv
            assert type(model.conv) is nn.Conv2d
            assert torch.equal(model(*given), expected)
            assert (type(math.pow(2, 3)), max(3, 1), min([2, 1])) == (float, 3, 1)
            time.sleep(0.2)
    finally:
        model.go.set()
        thread.join()


def test_samplers_of_one_model_are_first_called_in_threads() -> None:
    model = Aliased().eval()
    one = Sampler(model, Schedule.linear(), steps=2, optimize=True)
    plain = Sampler(model, Schedule.linear(), steps=2)
    expected = [plain.sample((1, 4, 6, 6), seed=i) for i in range(8)]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        own = Sampler(model, Schedule.linear(), steps=2, optimize=True)
        found[i] = (one if i % 2 else own).sample((1, 4, 6, 6), seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert distance(found[i], expected[i]) < 1e-5
