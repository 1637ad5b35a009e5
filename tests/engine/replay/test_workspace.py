"""Results in one memory: what is still read stays, and what leaves lies elsewhere."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.compile.networks import distance
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import Optimized, optimize
from stepfuse.engine.replay.capture import Recording
from stepfuse.engine.replay.workspace import Call, MemoryPlan, Planned, Workspace, may_alias
from stepfuse.kernels.backends import why_not

REORDERED = 3e-6  # float32 sums in another order, through a few layers
aten = torch.ops.aten
needs_module = pytest.mark.skipif(
    bool(why_not("cpp")), reason="needs the C++ module (a C++ compiler)"
)


def spans(plan: MemoryPlan) -> dict[str, tuple[int, int]]:
    """The bytes each result takes."""
    memory = torch.empty(plan.bytes, dtype=torch.uint8)
    found = {}
    for name, tensor in zip(plan.index, plan.tensors(memory), strict=True):
        start = tensor.data_ptr() - memory.data_ptr()
        found[name] = (start, start + tensor.nbytes)
    return found


def disjoint(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[1] <= b[0] or b[1] <= a[0]


def test_random_lines_never_overwrite_what_is_still_read() -> None:
    """Against values: every result is a number, written wherever its place is."""
    for seed in range(200):
        rng = random.Random(seed)
        calls: list[Call] = []
        for i in range(rng.randint(1, 25)):
            reads = [f"v{j}" for j in range(i) if rng.random() < 0.2]
            like = torch.empty(rng.randint(1, 300), dtype=rng.choice([torch.float32, torch.int16]))
            planned = rng.random() < 0.7
            views = not planned and rng.random() < 0.5
            calls.append(Call([f"v{i}"], reads, views, like if planned else None))
        kept = [f"v{len(calls) - 1}"]
        plan = MemoryPlan(calls, kept)
        places = spans(plan)
        alive: dict[str, set[str]] = {}  # what a name may be a view of
        written: dict[str, str] = {}  # the result whose value a place has
        for call in calls:
            (name,) = call.makes
            for read in call.reads:
                assert all(written[root] == root for root in alive[read]), (seed, name, read)
            alive[name] = {r for n in call.reads for r in alive[n]} if call.aliases else set()
            if name in places:
                alive[name] = {name}
                written[name] = name
                for other in set(written) - {name}:
                    if not disjoint(places[name], places[other]):
                        written[other] = "overwritten"
        assert not alive[kept[0]] & set(places), "what leaves has memory of its own"
        assert all(start % 64 == 0 for start, _ in places.values())


def test_a_chain_needs_two_places_and_a_view_keeps_its_own() -> None:
    like = torch.empty(1000)
    chain = [Call([f"v{i}"], [f"v{i - 1}"] if i else [], False, like) for i in range(9)]
    assert MemoryPlan(chain).bytes == 2 * 4032
    assert list(MemoryPlan(chain, ["v8"]).index) == [f"v{i}" for i in range(8)]
    viewed = [*chain[:2], Call(["w"], ["v0"], True), *chain[2:4], Call(["y"], ["w"], False)]
    places = spans(MemoryPlan(viewed))
    assert all(disjoint(places["v0"], places[f"v{i}"]) for i in (1, 2, 3))
    assert MemoryPlan([]).bytes == 0
    assert MemoryPlan([]).tensors(torch.empty(0, dtype=torch.uint8)) == []


def test_layouts_are_those_of_the_operators() -> None:
    image = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    turned = torch.empty(2, 7, 3, 5, dtype=torch.bfloat16).transpose(1, 2)
    plan = MemoryPlan([Call(["a"], [], False, image), Call(["b"], ["a"], False, turned)])
    for found, like in zip(
        plan.tensors(torch.empty(plan.bytes, dtype=torch.uint8)), (image, turned), strict=False
    ):
        assert (found.shape, found.stride(), found.dtype) == (
            like.shape,
            like.stride(),
            like.dtype,
        )


def test_who_may_return_an_argument() -> None:
    silent = (aten._unsafe_view.default, aten.lift_fresh.default)
    composite = (aten.reshape.default, aten.contiguous.default, aten.dropout.default)
    views = (aten.view.default, aten.permute.default, aten.slice.Tensor, aten.add_.Tensor)
    for target in (*silent, *composite, *views, F.silu):
        assert may_alias(target), target
    for target in (aten.silu.default, aten.add.Tensor, aten.mm.default, aten.clone.default):
        assert not may_alias(target), target


def test_a_workspace_serves_evaluations_of_any_size_and_outlives_errors() -> None:
    workspace = Workspace()
    plan = MemoryPlan([Call(["a"], [], False, torch.empty(10)), Call(["b"], ["a"], False, None)])

    def run(value: float, places: list[Tensor]) -> Tensor:
        if value < 0:
            raise ArithmeticError("negative")
        return places[0].fill_(value).sum()

    planned = Planned(run, plan, workspace)
    assert planned(2.0) == 20
    (piece,) = workspace.free
    with pytest.raises(ArithmeticError):
        planned(-1.0)
    assert workspace.free == [piece], "given back"
    large = workspace.take(MemoryPlan([Call(["a"], [], False, torch.empty(250))]))
    assert len(large.memory) == 1024
    assert workspace.free == [], "the smaller one is dropped"
    workspace.give(large)
    assert planned(3.0) == 30, "in the larger memory"
    assert workspace.free == [large]
    assert copy.deepcopy(workspace).free == []


class Decoder(nn.Module):
    """A residual block with a skip, tokens and an early result that leaves as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 64)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.point = nn.Conv2d(64, 64, 1)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        both = torch.cat([h, x], 1)
        h = self.second(F.silu(self.norm(both))) + self.point(both)
        early = h.permute(0, 2, 3, 1)
        tokens = self.linear(h.flatten(2).transpose(1, 2))
        h = h + tokens.transpose(1, 2).reshape(h.shape)
        return self.second(h), early


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """No form of oneDNN measures faster than ours."""

    def seconds(_x: Any, _w: Any, _stride: int, forms: tuple[str, ...], *_: Any) -> list[float]:
        return [1.0, *(0.5 for _ in forms)]

    monkeypatch.setattr("stepfuse.engine.compile.passes.convolution_forms._seconds", seconds)


def decoder() -> tuple[nn.Module, Optimized, Tensor]:
    model, x = Decoder().eval(), torch.randn(2, 32, 6, 4)
    return model, optimize(model, (x,)), x


def planned(fast: Optimized) -> MemoryPlan:
    (network,) = fast.networks
    assert isinstance(network.main, Planned)
    return network.main.plan


@needs_module
@pytest.mark.usefixtures("only_ours")
@torch.no_grad()
def test_results_do_not_change_with_the_next_evaluation() -> None:
    model, fast, x = decoder()
    assert len(planned(fast).index) >= 3
    first = fast(x)
    copies = [y.clone() for y in first]
    for y, exact in zip(first, model(x), strict=True):
        assert distance(y, exact) < REORDERED
    fast(torch.randn_like(x))
    assert all(torch.equal(y, before) for y, before in zip(first, copies, strict=True))
    # what was there before does not matter
    (piece,) = fast.networks[0].workspace.free
    piece.memory.view(torch.float32).fill_(torch.nan)
    assert all(torch.equal(y, before) for y, before in zip(fast(x), copies, strict=True))
    other = torch.randn(1, 32, 12, 10)
    for y, exact in zip(fast(other), model(other), strict=True):
        assert distance(y, exact) < REORDERED
    assert len(fast.networks[0].workspace.free) == 1, "networks of all shapes share one"
    assert all(torch.equal(y, before) for y, before in zip(fast(x), copies, strict=True))


@needs_module
@pytest.mark.usefixtures("only_ours")
def test_what_inference_mode_made_may_be_written_to_outside() -> None:
    with torch.inference_mode():
        model, fast, x = decoder()
        fast(x)
    (piece,) = fast.networks[0].workspace.free
    assert not piece.memory.is_inference()
    with torch.no_grad():
        given = torch.randn(2, 32, 6, 4)
        assert distance(fast(given)[0], model(given)[0]) < REORDERED


@needs_module
@pytest.mark.usefixtures("only_ours")
@torch.no_grad()
def test_threads_do_not_share_places() -> None:
    _, fast, x = decoder()
    inputs = [torch.randn_like(x) for _ in range(4)]
    expected = [[y.clone() for y in fast(v)] for v in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                got = fast(inputs[i])
                if not all(torch.equal(a, b) for a, b in zip(got, expected[i], strict=True)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_module
@pytest.mark.usefixtures("only_ours")
@torch.no_grad()
def test_a_recorded_step_has_a_memory_of_its_own() -> None:
    _, fast, x = decoder()
    out, early = (torch.empty_like(y) for y in fast(x))

    def step() -> None:
        y, z = fast(x)
        out.copy_(y)
        early.copy_(z)

    recording = Recording(step)
    for _ in range(2):
        x.normal_()
        expected = [y.clone() for y in fast(x)]
        out.fill_(torch.nan)
        recording.replay()
        assert torch.equal(out, expected[0])
        assert torch.equal(early, expected[1])
