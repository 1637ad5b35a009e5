"""Straight lines as text: what dies when, where results lie, and whom an error is laid to."""

from __future__ import annotations

import traceback
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfuse.engine.replay.workspace import Planned, Workspace
from stepfuse.engine.replay.writer import Writer, maker

aten = torch.ops.aten
LIKE = torch.empty(2, 3)


class Name(str):
    """A value that is known by a name."""


def writer(bound: dict[str, Any] | None = None) -> Writer:
    return Writer({} if bound is None else bound, lambda v: v if type(v) is Name else None)


def add(to: Writer, makes: str, function: Any, *args: Any, by: str = "", **kwargs: Any) -> None:
    """The line ``makes = function(*args)``."""
    names = [name.strip() for name in makes.split(",") if name.strip()]
    reads = [arg for arg in args if type(arg) is Name]
    to.call(function, args, kwargs, reads=reads, makes=names, target=makes, result=LIKE, by=by)


X, Y, V, W, WEIGHT = Name("x"), Name("y"), Name("v"), Name("w"), Name("weight")


def test_arguments_of_every_kind() -> None:
    seen: list[Any] = []

    def note(*args: Any, **kwargs: Any) -> None:
        seen.extend((args, kwargs))

    given = ([1, (True, "a")], (), (2.5,), None, torch.float16)
    to = writer()
    add(to, "", note, X, *given, key=[X])
    run = to.function("run", "<a test>", ["x"])
    assert run("this") is None
    assert seen == [("this", *given), {"key": ["this"]}]


def test_results_die_after_their_last_use_and_what_is_returned_does_not() -> None:
    made: dict[str, weakref.ref[Tensor]] = {}
    alive: list[set[str]] = []

    def make(name: str, *_: Tensor) -> Tensor:
        alive.append({other for other, ref in made.items() if ref() is not None})
        result = torch.ones(2)
        made[name] = weakref.ref(result)
        return result

    to = writer({"weight": torch.ones(2)})
    add(to, "v", make, "v", X, WEIGHT)
    add(to, "unread", make, "unread")
    add(to, "w", make, "w", V, V)
    add(to, "y", make, "y", W)
    run = to.function("run", "<a test>", ["x"], ["y", "v", "3"])
    results = run(torch.ones(2))
    assert alive == [set(), {"v"}, {"v"}, {"v", "w"}]
    assert [made["y"](), made["v"](), 3] == list(results)
    assert made["w"]() is None


def test_several_results_and_names_that_are_bound_anew() -> None:
    bound = {"weight": torch.ones(4)}
    to = writer(bound)
    add(to, "v, _,", aten.chunk.default, WEIGHT, 2)
    add(to, "w", aten.add.Tensor, V, 1)
    run = to.function("run", "<a test>", (), ["w"])
    assert torch.equal(run()[0], torch.full((2,), 2.0))
    bound["weight"] = torch.zeros(4)
    assert torch.equal(run()[0], torch.ones(2))


def test_no_lines() -> None:
    assert writer().function("run", "<a test>")() is None
    assert writer().function("run", "<a test>", ["x"], ["x", "None"])(7) == (7, None)
    assert writer().function("run", "<a test>", memory=Workspace())() is None


def doubled(x: Tensor, out: Tensor | None = None) -> Tensor:
    """An operator that can be told where to put its result."""
    return torch.mul(x, 2, out=out)


def lines() -> Writer:
    """Two results that may be put somewhere, the second of which is read by one that may not."""
    to = writer()
    add(to, "v", doubled, X)
    add(to, "w", doubled, V)
    add(to, "y", aten.sum.default, W)
    return to


def test_memory_is_shared_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def blank(function: Any, result: Tensor) -> Tensor | None:
        return result if function is doubled else None

    monkeypatch.setattr("stepfuse.engine.replay.writer.blank", blank)
    x, workspace = torch.randn(LIKE.shape), Workspace()
    plain = lines().function("run", "<a test>", ["x"], ["y"])
    shared = lines().function("run", "<a test>", ["x"], ["y"], workspace)
    assert isinstance(shared, Planned)
    assert list(shared.plan.index) == ["v", "w"]
    for run in (plain, shared, shared):
        assert torch.equal(run(x)[0], (4 * x).sum())
    (piece,) = workspace.free
    assert torch.equal(piece.places[1], 4 * x)
    assert "_k_places" not in plain.__code__.co_varnames
    kept = lines().function("run", "<a test>", ["x"], ["v", "w"], workspace)
    assert not isinstance(kept, Planned), "what leaves has memory of its own"


def test_an_error_is_laid_to_the_line_that_failed() -> None:
    bound: dict[str, Any] = {}
    runs = []
    for i, by in enumerate(("a pass", "another")):
        to = writer(bound)
        assert to.parts == i
        add(to, "v", aten.neg.default, X, by="innocent")
        add(to, "w", aten.mm.default, V, V, by=by)
        runs.append(to.function("run", f"<part {to.parts}>", ["x"], ["w"]))
    for i, run in enumerate(runs):
        assert torch.equal(run(torch.eye(2))[0], torch.eye(2))
        with pytest.raises(RuntimeError) as caught:
            run(torch.ones(3))
        assert maker(caught.value) == ("a pass", "another")[i]
        frame = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert (frame.filename, frame.name) == (f"<part {i}>", "run")
    assert maker(ValueError("of somebody else")) == ""
