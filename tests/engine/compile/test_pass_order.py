"""A user's pass beside ours: where it stands, what it is told, and what if it fails."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import distance, small
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import stepfuse as sf
from stepfuse.engine.compile.graph import aten, calls, replace

REORDERED = 1e-5  # float32 sums in another order, through some twenty layers
GAIN = 1.5


class Scaled(nn.Module):
    """A convolution whose weight is computed from two parameters, times a function of t."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(3, 3, 1, 1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = torch.conv2d(x, self.weight / self.gain)
        return y * torch.div(t, 2.0)[:, None, None, None]


def scaled() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return Scaled().eval(), (torch.randn(2, 3, 5, 7), torch.tensor([2, 6]))


def negate_twice(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
    """Every quotient twice with another sign; nothing is said of what the new nodes compute."""
    report = sf.PassReport("a name that nobody asked for", note="there and back")
    for node in calls(gm, aten.div.Tensor):
        report.count()
        with gm.graph.inserting_after(node):
            once = gm.graph.call_function(aten.neg.default, (node,))
        with gm.graph.inserting_after(once):
            twice = gm.graph.call_function(aten.neg.default, (once,))
        node.replace_all_uses_with(twice, delete_user_cb=lambda user, one=once: user is not one)
    return report


def report(fast: sf.Optimized, name: str) -> sf.PassReport:
    return next(r for r in fast.reports if r.name == name)


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_what_it_writes_runs_when_it_must(first: bool) -> None:
    model, given = scaled()
    passes = (negate_twice, *sf.PASSES) if first else (*sf.PASSES, negate_twice)
    fast = sf.optimize(model, given, passes=passes)
    assert distance(fast(*given), model(*given)) < REORDERED
    assert (report(fast, "negate_twice").matched, len(fast.networks)) == (2, 1)
    names = [r.name for r in fast.reports]
    assert names.index("negate_twice") == (0 if first else len(names) - 1)
    assert f"{'negate_twice':<23}2 of 2; there and back" in fast.explain()
    for stage in ("weights", "time"):
        assert fast.explain(graph=stage).count("negate_twice ") == 2, stage
    assert "negate_twice" not in fast.explain(graph="main")
    model.weight.mul_(2)
    fast.refresh()
    assert distance(fast(*given), model(*given)) < REORDERED


@torch.no_grad()
def test_it_is_told_what_ours_are_told() -> None:
    seen: list[sf.PassContext] = []

    def look(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
        seen.append(context)
        return sf.PassReport("look", applies=False)

    model, given = scaled()
    for dtype, weights in ((None, "kept"), (torch.bfloat16, "parked")):
        fast = sf.optimize(model, given, dtype, weights=weights, passes=[look])
        assert "look" not in fast.explain()
    (plain, lower) = seen
    assert (plain.dtype, plain.plain, lower.dtype, lower.plain) == (
        None, False, torch.bfloat16, True,
    )  # fmt: skip
    assert isinstance(plain.time, Node)
    assert plain.time.meta["val"].dtype is torch.int64
    assert callable(lower.pays)


@torch.no_grad()
def test_what_it_changes_is_its_own_affair() -> None:
    def larger(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
        done = sf.PassReport("larger")
        for node in calls(gm, aten.conv2d.default):
            done.count()
            with gm.graph.inserting_after(node):
                product = gm.graph.call_function(aten.mul.Tensor, (node, GAIN))
            node.replace_all_uses_with(product, delete_user_cb=lambda u, one=product: u is not one)
        return done

    model, given = scaled()
    fast = sf.optimize(model, given, passes=(larger, *sf.PASSES))
    assert distance(fast(*given), GAIN * model(*given)) < REORDERED
    off = sf.optimize(model, given, passes=(larger, *sf.PASSES), without=["larger"])
    assert distance(off(*given), model(*given)) < REORDERED
    assert "left out               larger" in off.explain()


@torch.no_grad()
def test_a_function_of_python_is_a_call_like_any_other() -> None:
    def doubled(x: Tensor) -> Tensor:
        return x + x

    def through_python(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
        done = sf.PassReport("through_python")
        for node in calls(gm, aten.mul.Tensor):
            done.count()
            with gm.graph.inserting_after(node):
                made = gm.graph.call_function(doubled, (node,))
            node.replace_all_uses_with(made, delete_user_cb=lambda u, one=made: u is not one)
        return done

    model, given = scaled()
    fast = sf.optimize(model, given, passes=(*sf.PASSES, through_python))
    assert distance(fast(*given), 2 * model(*given)) < REORDERED
    assert re.search(r"through_python +doubled\(mul", fast.explain(graph=True))


def raises(gm: GraphModule, context: sf.PassContext) -> Any:
    calls(gm, aten.sin.default)[0].args = ()  # halfway through
    raise KeyError("of mine")


def says_nothing(gm: GraphModule, context: sf.PassContext) -> Any:
    return None


def calls_a_module(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
    node = calls(gm, aten.conv2d.default)[0]
    gm.add_module("layer", nn.Identity())
    with gm.graph.inserting_after(node):
        gm.graph.call_module("layer", (node,))
    return sf.PassReport("calls_a_module")


def reads_too_early(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
    first, *_, last = calls(gm, aten.conv2d.default)
    with gm.graph.inserting_before(first):
        made = gm.graph.call_function(aten.neg.default, (last,))
    made.meta["val"] = first.meta["val"]
    first.replace_all_uses_with(made)
    return sf.PassReport("reads_too_early")


def of_another_shape(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
    (result,) = gm.graph.output_node().all_input_nodes
    with gm.graph.inserting_after(result):
        made = gm.graph.call_function(aten.reshape.default, (result, [9]))
    made.meta["val"] = result.meta["val"]
    gm.graph.output_node().replace_input_with(result, made)
    return sf.PassReport("of_another_shape")


def does_not_infer(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
    node = calls(gm, aten.conv2d.default)[0]
    with gm.graph.inserting_after(node):
        made = gm.graph.call_function(aten.reshape.default, (node, [9]))
    replace(node, made)
    return sf.PassReport("does_not_infer")


@pytest.mark.parametrize(
    ("broken", "why", "last"),
    [
        (raises, "KeyError: 'of mine'", False),
        (says_nothing, "TypeError: a pass must return a PassReport; got None", True),
        (
            calls_a_module,
            "ValueError: a pass may add calls of functions alone; got call_module",
            False,
        ),
        (reads_too_early, "KeyError: ", False),
        (of_another_shape, "RuntimeError: ", False),
        (of_another_shape, "RuntimeError: ", True),
        (does_not_infer, "RuntimeError: ", False),
    ],
)
@torch.no_grad()
def test_one_that_fails_is_left_out_and_named(
    broken: Callable[..., Any], why: str, last: bool
) -> None:
    """Before ours or after them; ours stay, and so does another one."""
    model, given = small()
    passes = (*sf.PASSES, broken) if last else (broken, *sf.PASSES)
    fast = sf.optimize(model, given, passes=(*passes, negate_twice))
    assert distance(fast(*given), model(*given)) < REORDERED
    text = fast.explain()
    assert f"{broken.__name__:<22} 0 of 0; left out: {why}" in text
    assert text.count("left out") == 1
    assert "prepack_convolutions   8 of 8" in text
    assert "negate_twice           " in text


@torch.no_grad()
def test_no_pass_at_all() -> None:
    model, given = small()
    fast = sf.optimize(model, given, torch.bfloat16, passes=())
    assert torch.equal(fast(*given), model(*given))
    assert fast.reports == []


@pytest.mark.parametrize(
    ("passes", "error", "words"),
    [
        (None, TypeError, r"passes must be a tuple of functions, like PASSES; got None"),
        (iter(sf.PASSES), TypeError, r"like PASSES; got tuple_iterator"),
        (negate_twice, TypeError, r"like PASSES; got function"),
        (["attention"], TypeError, r"functions with a name; got str 'attention'"),
        ([nn.Identity], TypeError, r"functions with a name; got type"),
        ([nn.Identity()], TypeError, r"functions with a name; got Identity"),
        ([functools.partial(negate_twice)], TypeError, r"with a name; got partial"),
        ([small], TypeError, r"passes must take \(gm, context\); got small\(scale_shift"),
        ((*sf.PASSES, sf.PASSES[0]), ValueError, r"got 2 of the name 'remove_no_ops'"),
    ],
)
def test_what_cannot_be_meant_is_refused(passes: Any, error: type[Exception], words: str) -> None:
    model, given = small()
    with pytest.raises(error, match=words):
        sf.optimize(model, given, passes=passes)


def test_names_to_leave_out_are_those_of_the_passes() -> None:
    model, given = small()
    with pytest.raises(ValueError, match="without must be one of negate_twice; got 'attention'"):
        sf.optimize(model, given, passes=[negate_twice], without=["attention"])


@torch.no_grad()
def test_copies_and_pickles_have_it() -> None:
    model, given = scaled()
    fast = sf.optimize(model, given, passes=(*sf.PASSES, negate_twice), timesteps=[2])
    assert fast.passes[:-1] == sf.PASSES
    text, expected = fast.explain(), fast(*given)
    for twin in (copy.copy(fast), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(*given), expected)
        assert twin.explain() == text
        twin.prepare([6])
        assert fast.timesteps == [2], "it has announced timesteps of its own"


@torch.no_grad()
def test_one_that_cannot_be_pickled_is_named() -> None:
    def local(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
        return sf.PassReport("local")

    model, given = scaled()
    fast = sf.optimize(model, given, passes=(*sf.PASSES, local))
    with pytest.raises(TypeError, match="cannot pickle this Optimized: its pass 'local'"):
        pickle.dumps(fast)
    twin = copy.deepcopy(fast)
    assert twin.passes == fast.passes
    assert torch.equal(twin(*given), fast(*given))
    sampler = sf.Sampler(fast, sf.Schedule.linear(), steps=2)
    with pytest.raises(TypeError, match=r"cannot pickle this Sampler: its model.*'local'"):
        pickle.dumps(sampler)


def narrower(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
    """Results of another dtype."""
    (result,) = gm.graph.output_node().all_input_nodes
    with gm.graph.inserting_after(result):
        cast = gm.graph.call_function(aten.to.dtype, (result, torch.float64))
    result.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    return sf.PassReport("narrower", 1, 1)


def test_results_of_another_kind_are_never_accepted() -> None:
    model, inputs = scaled()
    fast = sf.optimize(model, inputs, passes=(*sf.PASSES, narrower))
    assert fast(*inputs).dtype is torch.float32
    assert "narrower" in fast.explain()
    assert "results are" in fast.explain()


def test_a_report_that_two_passes_share_has_both_names() -> None:
    shared = sf.PassReport("shared", 1, 1)

    def one(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
        return shared

    def two(gm: GraphModule, context: sf.PassContext) -> sf.PassReport:
        return shared

    model, inputs = scaled()
    fast = sf.optimize(model, inputs, passes=(one, two))
    assert [report.name for report in fast.reports] == ["one", "two"]
