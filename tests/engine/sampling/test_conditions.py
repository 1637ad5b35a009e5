"""Conditions of any structure: followed from call to call, cut with the batch, guided."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

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
    Pair,
    Unknown,
    build,
    captures,
    mask,
    summed,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stepfuse as sf
from stepfuse.engine.replay.capture import CaptureRefused
from stepfuse.engine.sampling.lint import check_capturable

STRUCTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda a, b: {"a": {"x": a, "scale": 0.5}, "b": b},
    "list": lambda a, b: {"all": [a, [b, None]]},
    "tuple": lambda a, b: {"all": (a, (b, "name"))},
    "namedtuple": lambda a, b: {"pair": Pair(a, b)},
    "ordered": lambda a, b: {"all": collections.OrderedDict(p=a, q=b)},
    "defaultdict": lambda a, b: {"all": collections.defaultdict(list, p=a, q=b)},
    "deque": lambda a, b: {"all": collections.deque([a, b])},
    "model output": lambda a, b: {"out": Embeddings(text=a, image=b)},
    "numpy": lambda a, b: {"all": {"x": a.numpy(), "y": b}},
    "numpy at the top": lambda a, b: {"a": a.numpy()[::-1].astype(">f4"), "b": b},
}


@GRAPHS
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_each_call_has_its_own_tensors_and_each_batch_its_part(
    structure: Callable[[Tensor, Tensor], Any], graph: str | None
) -> None:
    used = build(graph=graph)
    images = []
    for seed in (1, 2):
        condition = structure(mask(seed), mask(seed + 10))
        images.append(used.sample(SHAPE, condition=condition))
        assert torch.equal(images[-1], build(graph=None).sample(SHAPE, condition=condition))
        parts = used.sample(SHAPE, condition=condition, batch_size=2)
        torch.testing.assert_close(parts, images[-1], rtol=0, atol=1e-6)
    assert not torch.equal(*images)
    if graph is not None:
        assert captures(used) == 3, "for batches of three, two and one, whatever they hold"


@GRAPHS
def test_every_way_to_sample_takes_them(graph: str | None) -> None:
    used = build(graph=graph)
    x0, other = mask(7).clamp(-1, 1), mask(8).clamp(-1, 1)
    calls: list[Callable[[sf.Sampler, Any], Tensor]] = [
        lambda s, c: [step.x for step in s.iterate(SHAPE, condition=c)][-1],
        lambda s, c: s.encode(x0, c),
        lambda s, c: s.decode(x0, c),
        lambda s, c: sf.interpolate(s, x0, other, 0.5, 700, condition=c),
    ]
    for call in calls:
        images = []
        for seed in (1, 2):
            condition = {"all": [mask(seed).numpy(), {"b": mask(seed + 1)}]}
            images.append(call(used, condition))
            assert torch.equal(images[-1], call(build(graph=None), condition))
        assert not torch.equal(*images)


def test_what_a_tensor_was_when_it_was_given_counts() -> None:
    sampler, values = build(), mask(1)
    condition = {"all": {"m": values}}
    first = sampler.sample(SHAPE, condition=condition)
    values.add_(1)
    assert not torch.equal(sampler.sample(SHAPE, condition=condition), first)
    values.sub_(1)
    torch.testing.assert_close(sampler.sample(SHAPE, condition=condition), first)
    assert captures(sampler) == 1


def test_a_model_may_change_the_containers_it_is_given() -> None:
    def popping(x: Tensor, t: Tensor, all: list[Tensor], named: dict[str, Tensor]) -> Tensor:
        return Bumpy()(x, t) + all.pop(0) + named.pop("m")

    condition = {"all": [mask(1)], "named": {"m": mask(2)}}
    image = build(popping, graph=None).sample(SHAPE, condition=condition)
    assert torch.equal(build(popping).sample(SHAPE, condition=condition), image)
    assert (len(condition["all"]), len(condition["named"])) == (1, 1)


def test_the_order_of_names_makes_no_other_program() -> None:
    sampler = build()
    sampler.sample(SHAPE, condition={"a": mask(1), "b": mask(2)})
    sampler.sample(SHAPE, condition={"b": mask(2), "a": mask(1)})
    assert captures(sampler) == 1


def test_bytes_of_nested_buffers_count() -> None:
    def held(condition: dict[str, Any], **settings: Any) -> int:
        sampler = build(**settings)
        sampler.sample(SHAPE, condition=condition)
        return sampler.stats()["bytes"]

    nested = {"all": [mask(1), {"m": mask(2)}], "n": mask(3)}
    assert held(nested) - held({}) == 3 * mask(1).nbytes
    replaced = sf.CFG(2.0, unconditional={"all": [0.0, {}]})
    assert held(nested, guidance=replaced) - held({}) == 4 * mask(1).nbytes, "one is replaced"


# --- guidance


@GRAPHS
@pytest.mark.parametrize("batched", [False, True])
def test_part_of_a_structure_is_replaced_for_the_unconditional_half(
    graph: str | None, batched: bool
) -> None:
    def condition(seed: int) -> dict[str, Any]:
        return {"kwargs": {"text": mask(seed), "time": mask(seed + 1)}, "scale": 2.0}

    null = mask(20, 1)
    guidance = sf.CFG(2.0, unconditional={"kwargs": {"text": null}}, batched=batched)
    sampler = build(graph=graph, guidance=guidance)
    for seed in (1, 5):
        given = condition(seed)
        without = {**given, "kwargs": {**given["kwargs"], "text": null.expand_as(mask(1))}}

        def by_hand(x: Tensor, t: Tensor, given: Any = given, without: Any = without) -> Tensor:
            uncond, cond = summed(x, t, **without), summed(x, t, **given)
            return uncond + 2.0 * (cond - uncond)

        expected = build(by_hand, graph=None).sample(SHAPE)
        got = sampler.sample(SHAPE, condition=given)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        parts = sampler.sample(SHAPE, condition=given, batch_size=2)
        torch.testing.assert_close(parts, got, rtol=0, atol=1e-5)


@GRAPHS
@pytest.mark.parametrize(
    "unconditional",
    [
        {"all": [mask(20, 1), mask(21)]},
        {"all": (0.0, np.zeros((1, 1, 4, 4), np.float32))},
        {"all": None},
        {"all": {"other": mask(20), "names": "x"}, "more": mask(22, 1)},
        {"more": torch.tensor(0.5)},
    ],
)
def test_any_other_structure_may_take_its_place(unconditional: Any, graph: str | None) -> None:
    given = {"all": [mask(1), mask(2)]}
    sampler = build(graph=graph, guidance=sf.CFG(2.0, unconditional=unconditional))
    got = sampler.sample(SHAPE, condition=given)
    whole = {
        name: pytree.tree_map(
            lambda v: torch.as_tensor(v).expand(3, 1, 4, 4) if hasattr(v, "shape") else v, value
        )
        for name, value in {**given, **unconditional}.items()
    }

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = summed(x, t, **whole), summed(x, t, **given)
        return uncond + 2.0 * (cond - uncond)

    expected = build(by_hand, graph=None).sample(SHAPE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    parts = sampler.sample(SHAPE, condition=given, batch_size=2)
    torch.testing.assert_close(parts, got, rtol=0, atol=1e-5)


@pytest.mark.parametrize("held", ["dict", "namedtuple", "ordered", "defaultdict", "model output"])
def test_part_of_any_dict_may_be_replaced(held: str) -> None:
    given = STRUCTURES[held](mask(1), mask(2))
    (name,) = given if held != "dict" else ("a",)
    new: Any = {("x" if held == "dict" else "text" if held == "model output" else "p"): mask(9)}
    if held == "namedtuple":
        new = Pair(mask(9), 0.0)
    sampler = build(guidance=sf.CFG(2.0, unconditional={name: new}))
    got = sampler.sample(SHAPE, condition=given)
    leaves, spec = pytree.tree_flatten(dict(sorted(given.items())))
    leaves[0] = mask(9)
    if held == "namedtuple":
        leaves[1] = torch.zeros_like(mask(2))
    without = pytree.tree_unflatten(leaves, spec)

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = summed(x, t, **without), summed(x, t, **given)
        return uncond + 2.0 * (cond - uncond)

    expected = build(by_hand, graph=None).sample(SHAPE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_changed_unconditional_tensor_is_in_force() -> None:
    null = {"m": [mask(20, 1)]}
    sampler = build(guidance=sf.CFG(2.0, unconditional=null))
    first = sampler.sample(SHAPE, condition={"m": [mask(1)]})
    null["m"][0].add_(1)
    changed = sampler.sample(SHAPE, condition={"m": [mask(1)]})
    assert not torch.equal(changed, first)
    null["m"] = [0.5]
    fresh = build(graph=None, guidance=sf.CFG(2.0, unconditional={"m": [0.5]}))
    expected = fresh.sample(SHAPE, condition={"m": [mask(1)]})
    assert torch.equal(sampler.sample(SHAPE, condition={"m": [mask(1)]}), expected)


@pytest.mark.parametrize(
    ("unconditional", "batched", "error", "message"),
    [
        ({"a": {"m": TWO}}, False, ValueError, r"unconditional 'a.m' .*\(3, 1, 4, 4\); got .*2\)"),
        ({"b": [TWO]}, False, ValueError, r"unconditional 'b\[0\]' .*\(3, 2\); got shape"),
        ({"y": torch.tensor(0.5)}, False, TypeError, "unconditional 'y' .* torch.int64 .*float32"),
        ({"y": 0.5}, False, TypeError, "unconditional 'y' .* torch.int64 .* got torch.float32"),
        ({"a": {"m": Unknown(ONE)}}, False, TypeError, "unconditional 'a.m' .* holds a tensor"),
        ({"a": {"m": None}}, True, ValueError, "needs a tensor for unconditional 'a.m'.* got None"),
        ({"a": {"s": 2.0}}, True, ValueError, "one setting .* unconditional 'a.s' is 2.0, .* 1.0"),
        ({"a": None}, True, ValueError, "same entries .* unconditional 'a' is None"),
        ({"z": mask(1)}, True, ValueError, "same entries .*'z'"),
    ],
)
def test_what_guidance_cannot_replace_is_named(
    unconditional: Any, batched: bool, error: type[Exception], message: str
) -> None:
    condition = {"a": {"m": mask(1), "s": 1.0}, "y": torch.tensor([1, 2, 3])}
    sampler = build(guidance=sf.CFG(2.0, unconditional=unconditional, batched=batched))
    with pytest.raises(error, match=message):
        sampler.sample(SHAPE, condition=condition)


@GRAPHS
@pytest.mark.parametrize("returns", ["log_probability", "gradient"])
def test_a_classifier_gets_the_same_condition(graph: str | None, returns: Any) -> None:
    def log_probability(x: Tensor, t: Tensor, all: list[Any], scale: float) -> Tensor:
        assert isinstance(all[0], Tensor)
        return -scale * ((x - all[0] - all.pop()["b"]) ** 2).flatten(1).sum(1)

    def gradient(x: Tensor, t: Tensor, all: list[Any], scale: float) -> Tensor:
        return -2 * scale * (x - all[0] - all.pop()["b"])

    fn = log_probability if returns == "log_probability" else gradient
    sampler = build(graph=graph, guidance=sf.ClassifierGuidance(fn, 1.0, returns))
    images = []
    for seed in (1, 2):
        condition = {"all": [mask(seed), {"b": mask(seed + 5).numpy()}], "scale": 0.1}
        images.append(sampler.sample(SHAPE, condition=condition))
        fresh = build(graph=None, guidance=sf.ClassifierGuidance(gradient, 1.0, "gradient"))
        expected = fresh.sample(SHAPE, condition=condition, batch_size=1)
        torch.testing.assert_close(images[-1], expected, rtol=0, atol=1e-5)
    assert not torch.equal(*images)


# --- the check for CUDA graphs


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 1)

    def forward(self, x: Tensor, t: Tensor, kwargs: dict[str, Any], pair: Pair) -> Tensor:
        shift = self.project(kwargs["m"]) + pair.first.mean(1, True)
        return x + kwargs["scale"] * shift.view(-1, 1, 1, 1)


@pytest.mark.parametrize("batched", [False, True])
def test_nested_conditions_can_be_checked_for_capture(batched: bool) -> None:
    condition = {"kwargs": {"m": np.zeros((3, 2), np.float32), "scale": 2.0}, "pair": Pair(ONE, 1)}
    unconditional = {"kwargs": {"m": 0.0}}
    guidance = sf.CFG(2.0, unconditional=unconditional, batched=batched)
    check_capturable(build(Conditioned()), SHAPE, condition)
    check_capturable(build(Conditioned(), guidance=guidance), SHAPE, condition)

    def reading(x: Tensor, t: Tensor, kwargs: dict[str, Any], pair: Pair) -> Tensor:
        return x * float(kwargs["m"].sum())

    with pytest.raises(CaptureRefused, match="read on the host"):
        check_capturable(build(reading), SHAPE, condition)
