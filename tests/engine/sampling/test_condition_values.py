"""What is in a condition: settings by value, lists of numbers, and what is refused by name."""

from __future__ import annotations

import array
import collections
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from tests.engine.sampling.conditioned import (
    GRAPHS,
    ONE,
    SHAPE,
    TWO,
    Embeddings,
    Options,
    Pair,
    Slotted,
    Unknown,
    build,
    captures,
    mask,
    summed,
)
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.sampling.lint import check_capturable


@dataclass(frozen=True)
class Frozen:
    scale: float
    more: tuple[int, ...] = ()


def scaled(x: Tensor, t: Tensor, by: Any) -> Tensor:
    return Bumpy()(x, t) * total(by() if callable(by) else getattr(by, "scale", by))


def total(scale: Any) -> float:
    if isinstance(scale, (list, tuple, set, frozenset)):
        return sum(map(total, scale))
    return float(scale)


SETTINGS: list[tuple[Any, Any]] = [
    (0.5, 0.25),
    (1, 2),
    (True, False),
    ("1", "2"),
    (np.float64(0.5), np.float64(0.25)),
    (np.int32(1), np.int32(2)),
    ((0.5, 1), (0.5, 2)),
    ({0.5, 1.0}, {0.5}),
    (frozenset({0.5}), frozenset({0.25})),
    ([(0.5,)], [(0.25,)]),
    (Options(0.5), Options(0.25)),
    (Options([0.5, [1]]), Options([0.5, [2]])),
    (Slotted(0.5), Slotted(0.25)),
    (Frozen(0.5), Frozen(0.25)),
    (lambda: 0.5, lambda: 0.25),
    ((0.0,) * 5000 + (1.0,) + (0.0,) * 5000, (0.0,) * 5000 + (2.0,) + (0.0,) * 5000),
]


@pytest.mark.parametrize(
    ("first", "second"), SETTINGS, ids=lambda v: str(v).partition(" at 0x")[0][:30]
)
def test_settings_count_by_value(first: Any, second: Any) -> None:
    sampler = build(scaled)
    for value in (first, second, first):
        expected = build(scaled, graph=None).sample(SHAPE, condition={"by": value})
        assert torch.equal(sampler.sample(SHAPE, condition={"by": value}), expected)
    assert captures(sampler) == 2


@pytest.mark.parametrize("kind", [Options, Slotted])
@pytest.mark.parametrize("scale", [0.5, [0.5, {"a": 1}]], ids=["number", "dict"])
@GRAPHS
def test_an_object_that_was_changed_is_another_setting(
    kind: Any, scale: Any, graph: str | None
) -> None:
    options = kind(copy.deepcopy(scale))

    def model(x: Tensor, t: Tensor, by: Any) -> Tensor:
        scale = by.scale if isinstance(by.scale, float) else by.scale[1]["a"]
        return Bumpy()(x, t) * scale

    sampler = build(model, graph=graph)
    before = sampler.sample(SHAPE, condition={"by": options})
    if isinstance(options.scale, list):
        options.scale[1]["a"] = 2
    else:
        options.__init__(0.25)  # as an assignment to its attribute
    after = sampler.sample(SHAPE, condition={"by": options})
    assert not torch.equal(after, before)
    assert torch.equal(after, build(model, graph=None).sample(SHAPE, condition={"by": options}))


class Mode:
    """A class whose attribute is a setting."""

    k: Any = 0.5

    def value(self) -> float:
        return float(total(self.k))


GLOBAL: list[float] = [0.5]


def reads_a_global() -> float:
    return GLOBAL[0]


def changing(what: str) -> tuple[Any, Callable[[], None]]:
    """A setting that a model calls or reads ``k`` of, and what makes it mean something else."""
    state = [0.5]
    local = 0.5

    def default(held: list[float] = state) -> float:
        return held[0]

    def enclosed() -> float:
        return local

    def through() -> float:
        return enclosed()

    def rebind() -> None:
        nonlocal local
        local = 0.25

    class Own(Mode):
        pass

    class Listed(Mode):
        k: ClassVar[list[float]] = [0.5]

    def fill() -> None:
        state[0] = 0.25

    def fill_global() -> None:
        GLOBAL[0] = 0.25

    own, net = Own(), nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.5)

    def set_class() -> None:
        Own.k = 0.25

    def set_weight() -> None:
        net.weight = nn.Parameter(torch.full((1, 1), 0.25))

    def set_method() -> None:
        Own.value = lambda self: 0.25  # type: ignore[method-assign]

    found: dict[str, tuple[Any, Callable[[], None]]] = {
        "closure": (lambda: state[0], fill),
        "variable": (enclosed, rebind),
        "function in a closure": (through, rebind),
        "default": (default, fill),
        "global": (reads_a_global, fill_global),
        "partial": (functools.partial(default), fill),
        "method": (own.value, lambda: setattr(own, "k", 0.25)),
        "method, by its class": (own.value, set_class),
        "method, exchanged": (own, set_method),
        "class": (Own, set_class),
        "list in a class": (Listed, lambda: Listed.k.__setitem__(0, 0.25)),
        "object, by its class": (own, set_class),
        "weight in a closure": (lambda: net.weight, set_weight),
    }
    return found[what]


def read(x: Tensor, t: Tensor, by: Any) -> Tensor:
    if isinstance(by, type):
        return Bumpy()(x, t) * total(by.k)
    value = by.value() if isinstance(by, Mode) else by()
    return Bumpy()(x, t) * value


KINDS = [
    "closure", "variable", "function in a closure", "default", "global", "partial", "method",
    "method, by its class", "method, exchanged", "class", "list in a class",
    "object, by its class", "weight in a closure",
]  # fmt: skip


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("when", ["between calls", "in a callback"])
def test_what_a_setting_reads_is_part_of_it(
    what: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []
    for graph in (None, "step"):
        monkeypatch.setitem(globals(), "GLOBAL", [0.5])
        setting, change = changing(what)
        sampler = build(read, graph=graph)
        condition = {"by": setting}
        called = False

        def once(step: sf.Step, change: Callable[[], None] = change) -> None:
            nonlocal called
            if step.index == 0 and not called:
                called = True
                change()

        first = sampler.sample(SHAPE, condition=condition)
        if when == "between calls":
            change()
            images.append([first, sampler.sample(SHAPE, condition=condition)])
        else:
            changed = sampler.sample(SHAPE, condition=condition, callback=once)
            images.append([first, changed, sampler.sample(SHAPE, condition=condition)])
        assert not torch.equal(images[-1][0], images[-1][1])
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    assert sampler.stats()["eager_steps"] == 0, sampler.explain()


def test_a_setting_that_was_changed_in_a_callback_leaves_nothing_behind() -> None:
    """The next call finds the program under what the setting was at first."""
    sampler, options = build(scaled), Options(0.5)
    before = sampler.sample(SHAPE, condition={"by": options})

    def change(step: sf.Step) -> None:
        options.scale = 0.25

    sampler.sample(SHAPE, condition={"by": options}, callback=change)
    assert torch.equal(sampler.sample(SHAPE, condition={"by": Options(0.5)}), before)


def test_code_that_reaches_much_is_a_setting_too() -> None:
    """Libraries, tensors, modules and large containers that it reads are not looked into."""
    much, net, one = list(range(10**6)), nn.Linear(2, 2), torch.ones(3)

    def function() -> float:
        return float(np.float64(len(much) / 10**6)) + 0 * one[0] + 0 * net.weight[0, 0]

    sampler = build(lambda x, t, by: Bumpy()(x, t) * by())
    for _ in range(2):
        sampler.sample(SHAPE, condition={"by": function})
    assert captures(sampler) == 1


def test_numbers_that_are_equal_are_not_the_same() -> None:
    """0 == 0.0 == -0.0 == False, and nan != nan."""
    sampler = build(lambda x, t, by: Bumpy()(x, t) + torch.copysign(x, torch.tensor(float(by))))
    values = [0.0, -0.0]
    images = [sampler.sample(SHAPE, condition={"by": v}) for v in values]
    assert not torch.equal(*images)
    sampler = build(lambda x, t, by: Bumpy()(x, t) * (2.0 if by != by else 1.0))
    for _ in range(3):
        sampler.sample(SHAPE, condition={"by": float("nan")})
    assert captures(sampler) == 1


def test_the_caller_s_own_object_reaches_an_eager_model() -> None:
    def model(x: Tensor, t: Tensor, seen: Any) -> Tensor:
        seen().append(int(t[0]))
        return Bumpy()(x, t)

    sampler = build(model, graph=None)
    for _ in range(2):
        seen: list[int] = []
        sampler.sample(SHAPE, condition={"seen": lambda seen=seen: seen})
        assert seen == sampler.timesteps


class Meta(type):
    def __repr__(cls) -> str:
        return "..."


def test_layouts_do_not_collide_where_reprs_do() -> None:
    class Quiet(metaclass=Meta):
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __repr__(self) -> str:
            return "Quiet(...)"

    sampler = build(scaled)
    images = [sampler.sample(SHAPE, condition={"by": Quiet(scale)}) for scale in (0.5, 0.25)]
    assert not torch.equal(*images)


# --- lists of numbers


def test_a_list_of_numbers_is_a_tensor_with_one_entry_per_sample() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return Bumpy()(x, t) + y.to(x.dtype).view(len(x), -1, 1, 1).mean(1, True)

    lists: list[tuple[Any, torch.dtype, tuple[int, ...]]] = [
        ([3, 7, 1], torch.int64, (3,)),
        ([0.5, 1, 2], torch.float32, (3,)),
        ([True, False, True], torch.bool, (3,)),
        ([np.int64(3), np.int64(4), np.int64(5)], torch.int64, (3,)),
        ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], torch.float32, (3, 2)),
    ]
    for values, dtype, shape in lists:
        seen: list[Tensor] = []
        image = build(model, graph=None).sample(SHAPE, condition={"y": values})
        assert (seen[0].dtype, tuple(seen[0].shape)) == (dtype, shape)
        tensor = torch.tensor(np.array(values), dtype=dtype)
        again = build(model, graph=None).sample(SHAPE, condition={"y": tensor}, batch_size=1)
        torch.testing.assert_close(image, again, rtol=0, atol=1e-6)


def test_a_tuple_of_numbers_is_a_setting_whatever_its_length() -> None:
    seen = []

    def model(x: Tensor, t: Tensor, size: Any, more: Any) -> Tensor:
        seen.append((size, more))
        return Bumpy()(x, t)

    condition = {"size": (4, 4, 4), "more": {"scales": [0.5, 1.0, 2.0]}}
    build(model, graph=None).sample(SHAPE, condition=condition, batch_size=1)
    assert all(got == ((4, 4, 4), {"scales": [0.5, 1.0, 2.0]}) for got in seen)


# --- refusals


def inside_itself() -> dict[str, Any]:
    outer: dict[str, Any] = {}
    outer["inner"] = [outer]
    return outer


REFUSED: list[tuple[Any, type[Exception], str]] = [
    ([ONE], TypeError, "condition must be a dict .* got list"),
    ({3: ONE}, TypeError, "condition must have the names of arguments as keys; got 3"),
    ({"a": {"b": TWO}}, ValueError, r"condition 'a.b' .*\(3\); got shape \(2, 2\)"),
    ({"a": [ONE, TWO]}, ValueError, r"condition 'a\[1\]' .* got shape \(2, 2\)"),
    ({"a": Pair(ONE, TWO)}, ValueError, r"condition 'a.second' .* got shape \(2, 2\)"),
    ({"a": Embeddings(image=TWO)}, ValueError, r"condition 'a.image' .* got shape \(2, 2\)"),
    ({"a": {0: TWO}}, ValueError, r"condition 'a\[0\]' .* got shape"),
    ({"a": {"b": TWO.numpy()}}, ValueError, r"condition 'a.b' .* got shape \(2, 2\)"),
    ({"a": [torch.tensor(1)]}, ValueError, r"condition 'a\[0\]' .* got shape \(\)"),
    ({"a": np.array(1.0)}, ValueError, r"condition 'a' .* got shape \(\)"),
    ({"a": [1, 2]}, ValueError, r"condition 'a' .* per sample \(3\); got shape \(2,\)"),
    ({"a": [[1], [2, 3], [4]]}, ValueError, "condition 'a' must be a list that makes a tensor"),
    ({"a": [2**70, 1, 1]}, ValueError, "condition 'a' must be a list that makes a tensor"),
    ({"a": {"b": np.array([None] * 3)}}, TypeError, "'a.b' .* PyTorch knows; got dtype object"),
    ({"a": np.array(["x", "y", "z"])}, TypeError, "'a' .* got dtype <U1"),
    ({"a": np.zeros(3, "M8[s]")}, TypeError, "'a' .* got dtype datetime64"),
    ({"a": np.ma.masked_array([1, 2, 3])}, TypeError, "'a' .* got a masked array"),
    ({"a": ONE.to_sparse()}, TypeError, "'a' must be a dense tensor; got a torch.sparse_coo"),
    ({"a": ONE.to("meta")}, TypeError, "'a' must be a dense tensor; got one without data"),
    (
        {"added_cond_kwargs": {"image_embeds": Unknown(ONE)}},
        TypeError,
        r"condition 'added_cond_kwargs.image_embeds' .*Unknown, which holds a tensor at .embeds",
    ),
    ({"a": Unknown(1, {"b": [ONE]})}, TypeError, r"holds a tensor at .more\['b'\]\[0\]"),
    ({"a": SimpleNamespace(x=ONE.numpy())}, TypeError, "holds an array .*ndarray.* at .x"),
    ({"a": collections.UserDict(x=ONE)}, TypeError, "'a' .*UserDict, which holds a tensor"),
    ({"a": functools.partial(summed, ONE)}, TypeError, "'a' .*partial, which holds a tensor"),
    ({"a": Slotted(ONE)}, TypeError, "'a' .*Slotted, which holds a tensor at ._Slotted__scale"),
    ({"a": {ONE}}, TypeError, "'a' .*set, which holds a tensor"),
    ({"a": nn.Linear(2, 2)}, TypeError, "'a' .*Linear, which holds a tensor"),
    ({"a": bytearray(3)}, TypeError, "'a' .*bytearray, which holds memory"),
    ({"a": array.array("d", [1.0])}, TypeError, "'a' .*array, which holds memory"),
    ({"a": Options(list(range(10**6)))}, TypeError, "'a' .* more than 100000 parts"),
    ({"a": inside_itself()}, ValueError, r"condition 'a.inner\[0\]' must not contain itself"),
]


@pytest.mark.parametrize(("condition", "error", "message"), REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(
    condition: Any, error: type[Exception], message: str
) -> None:
    sampler = build()
    calls: list[Callable[[], Any]] = [
        lambda: sampler.sample(SHAPE, condition=condition),
        lambda: sampler.sample(SHAPE, condition=condition, batch_size=2),
        lambda: sampler.iterate(SHAPE, condition=condition),  # before the first step is asked for
        lambda: sampler.encode(mask(1), condition),
        lambda: sampler.decode(mask(1), condition),
        lambda: sf.interpolate(sampler, mask(1), mask(2), 0.5, 700, condition=condition),
        lambda: check_capturable(sampler, SHAPE, condition),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    assert sampler.stats()["programs"] == 0
    sampler.sample(SHAPE)
