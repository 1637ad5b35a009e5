"""Modules of unusual build: compiled they compute the same, and they stay what they were.

Every module here is looked at before and after `optimize`, and after it failed: parameters, buffers
and attributes are the same objects with the same values, other shapes still run, state_dict still
saves.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.engine.passes.networks import distance
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from stepfuse import Sampler, Schedule
from stepfuse.engine.optimize import Optimized, optimize

# float32 sums in another order
REORDERED = 1e-6


def conv(c_in: int = 4, c_out: int = 4) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Aliased(nn.Module):
    """Two convolutions under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv(), conv()
        self.blocks = nn.ModuleList([self.c1, self.c2])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + t.view(-1, 1, 1, 1) / 1000
        out: Tensor = self.c1(x)
        return out


class Tied(nn.Module):
    """One weight in two layers, an embedding that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 4)
        self.head = nn.Linear(4, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.a, self.b = conv(), conv()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = self.embed(t)
        return self.b(self.a(x)) + self.head(e)[:, :4, None, None] + e[:, :, None, None]


class SharedState(nn.Module):
    """Modules that hand each other tensors through a dict, which is empty between two calls."""

    class Part(nn.Module):
        def __init__(self, shared: dict[str, Any]) -> None:
            super().__init__()
            self.shared, self.conv = shared, conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mul_(self.shared["scale"])

    def __init__(self) -> None:
        super().__init__()
        self.shared: dict[str, Any] = {}
        self.parts = nn.ModuleList([self.Part(self.shared), self.Part(self.shared)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.shared["scale"] = 1 + t.view(-1, 1, 1, 1) / 1000
        for part in self.parts:
            x = part(x)
        self.shared.clear()
        return x


class WeightNorm(nn.Module):
    """Both of PyTorch's: a parametrisation, and the older hook that writes a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(conv())
        self.b = nn.utils.weight_norm(conv())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


class Orthogonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a(x.movedim(1, -1)).movedim(-1, 1)


class BuffersTwice(nn.Module):
    """One buffer under two names, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("scale", torch.rand(4, 1, 1))
        self.register_buffer("again", self.scale)
        self.register_buffer("shift", torch.rand(4, 1, 1), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * self.scale + self.again * self.shift


class InADict(nn.Module):
    """Layers in a ModuleDict, parameters in a ParameterList, modules in a plain tuple as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"first": conv(), "second": conv()})
        self.scales = nn.ParameterList([torch.rand(4, 1, 1), torch.rand(4, 1, 1)])
        self.order = (self.layers["second"], self.layers["first"])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer, scale in zip(self.order, self.scales, strict=True):
            x = layer(x) * scale
        return x


class Hooked(nn.Module):
    """Hooks that compute, as closures over the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()
        self.a.register_forward_hook(lambda module, args, out: out * self.b.weight.mean())
        self.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


class Lazy(nn.Module):
    """Builds a tensor at the first call and keeps it, in an attribute and in a dict by size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.grid: Tensor | None = None
        self.cache: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.arange(4, dtype=torch.float32).view(4, 1, 1)
        size = tuple(x.shape[2:])
        if size not in self.cache:
            self.cache[size] = torch.linspace(0, 1, size[0] * size[1]).view(size)
        return self.conv(x) * self.grid + self.cache[size]


@functools.lru_cache
def ramp(count: int) -> Tensor:
    return torch.linspace(-1, 1, count)


_TABLES: dict[int, Tensor] = {}


class CachedElsewhere(nn.Module):
    """Keeps what it builds in a cached function and in a dict of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        width = x.shape[-1]
        if width not in _TABLES:
            _TABLES[width] = torch.linspace(0, 2, width)
        return self.conv(x) * ramp(width) + _TABLES[width]


@dataclasses.dataclass
class Options:
    scale: float = 1.5
    table: Tensor = dataclasses.field(default_factory=lambda: torch.rand(4, 1, 1))


class Described(nn.Module):
    """Settings in a dataclass, which also counts calls back to where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.options, self.conv, self.depth = Options(), conv(), [0]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.depth[0] += 1
        x = self.conv(x) * self.options.scale + self.options.table
        self.depth[0] -= 1
        return x


class Answering(nn.Module):
    """A ``__getattr__`` of its own, and a property in the place of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self._settings = conv(), {"gain": 2.0}

    def __getattr__(self, name: str) -> Any:
        if name == "gain":
            return self._settings["gain"]
        return super().__getattr__(name)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = torch.conv2d(x, self.weight, padding=1) * self.gain
        return out


class Parent(nn.Module):
    """A child that knows its parent, by a weak reference and by a bound method."""

    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            object.__setattr__(self, "parent", weakref.ref(parent))
            self.after: Callable[[Tensor], Tensor] = parent.finish

        def forward(self, x: Tensor) -> Tensor:
            return self.after(x) * self.parent().gain

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.conv = 3.0, conv()
        self.child = self.Child(self)

    def finish(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.child(x)
        return out


class Patched(nn.Module):
    """A layer whose forward was put over the one of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        before = self.conv.forward
        self.conv.forward = lambda x: before(x) + self.conv.bias.sum()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Attribute(nn.Module):
    """A tensor that is neither a parameter nor a buffer, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tables = conv(), [torch.rand(4, 1, 1)]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * self.tables[0]


COMPILED = [
    Aliased, Tied, SharedState, WeightNorm, Orthogonal, BuffersTwice, InADict, Hooked, Lazy,
    CachedElsewhere, Described, Answering, Parent, Patched, Attribute,
]  # fmt: skip


class Counting(nn.Module):
    """Decides by how often it was called: no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.calls = conv(), nn.GroupNorm(2, 4), 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.norm(self.conv(x)) * self.calls
        return out


class Keeping(nn.Module):
    """Leaves its features where the user looks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.features, self.seen = conv(), None, []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.features = self.conv(x)
        self.seen.append(self.features)
        return self.features * 2


class Branching(nn.Module):
    """Decides by the values of x, and has two names for one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = conv()
        self.blocks, self.norm = nn.ModuleList([self.c1]), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.norm(self.blocks[0](x) if x.mean() > 0 else x)
        return out


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
            self.down, self.up = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)

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
