"""Modules of unusual build, (x [N, 4, H, W], t [N]) -> [N, 4, H, W]."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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
