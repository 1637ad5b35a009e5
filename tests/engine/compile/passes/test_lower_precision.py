"""Lower precision where the processor has it, and never an exception from inside a layer."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import distance, small, traced
from tests.engine.compile.passes.precision_cases import NAMES, case
from torch import Tensor, nn

from stepfuse.engine.compile import network, precision_trial, runs
from stepfuse.engine.compile.graph import PassContext, PassReport, aten, calls, value
from stepfuse.engine.compile.optimize import Optimized, optimize
from stepfuse.engine.compile.passes import (
    attention,
    convolution_forms,
    lower_precision,
    upsampled_convolutions,
)

DTYPES = (torch.bfloat16, torch.float16)
# three layers one after the other round to 8 or 11 bits (relative 2^-9 and 2^-12) sums of up to 256
# products, and some operators between them cancel
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
REORDERED = 2e-6  # float32 sums in another order
WAYS = ("timed", "low and the first form", "one layer of two and the last form")
LESSER = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "STEPFUSE_ISA": "avx2",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every choice that is made by a stopwatch, one way and another."""
    name = str(request.param)
    trials = [
        module._seconds
        for module in (attention, convolution_forms, precision_trial, upsampled_convolutions)
    ]
    if name != "timed":
        # a processor that has instructions for every dtype, so that `runs` alone must know better
        monkeypatch.setattr(lower_precision, "has_instructions", lambda *_: True)
        turns = itertools.cycle([True, False])
        decide: dict[str, Callable[..., bool]] = {
            "low and the first form": lambda *_: True,
            "one layer of two and the last form": lambda *_: next(turns),
        }
        monkeypatch.setattr(network, "pays", decide[name])

        def times(runs: list[Any], *_: Any, **__: Any) -> list[float]:
            for run in runs:
                run()
            order = range(1, 1 + len(runs))
            return [float(t) for t in (reversed(order) if "last" in name else order)]

        for module in (attention, convolution_forms, precision_trial, upsampled_convolutions):
            monkeypatch.setattr(module, "best_times", times)
    for seconds in trials:
        seconds.cache_clear()  # type: ignore[attr-defined]
    yield name
    for seconds in trials:
        seconds.cache_clear()  # type: ignore[attr-defined]


def report(fast: Optimized, name: str = "lower_precision") -> PassReport:
    return next(r for r in fast.reports if r.name == name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_operator_after_a_lowered_layer(way: str, name: str, dtype: torch.dtype) -> None:
    model, inputs = case(name)
    expected = model(*inputs)
    result = optimize(model, inputs, dtype)(*inputs)
    assert result.dtype is expected.dtype
    assert result.shape == expected.shape
    assert distance(result, expected) < TOLERANCES[dtype]


class Kinds(nn.Module):
    """A layer in every dimension, and products without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.image = nn.Conv1d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.volume, self.tokens = nn.Conv3d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(x.flatten(2)).view(x.shape)
        x = self.volume(self.image(x).unsqueeze(-1)).squeeze(-1)
        tokens = self.tokens(x.flatten(2).mT)
        out: Tensor = tokens @ tokens.mT
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_processor_without_instructions_for_it_computes_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bf16", "fp16"):
        asked = f"_is_mkldnn_{name}_supported"
        monkeypatch.setattr(torch.ops.mkldnn, asked, lambda: False, raising=True)
    model, x = Kinds().eval(), torch.randn(2, 4, 6, 5)
    fast = optimize(model, (x,), dtype)
    assert distance(fast(x), model(x)) < REORDERED
    done = report(fast)
    assert done.left == {f"no instructions for {dtype} on this CPU": 5}
    assert f"no layer in {dtype}: the network runs in float32" in fast.explain()


def refusing(*names: str) -> Callable[..., Any]:
    """`outcome`, where operators of these names refuse reduced precision."""

    def asked(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        low = any(isinstance(v, Tensor) and v.dtype in DTYPES for v in given)
        if low and str(target).split(".")[-2] in names:
            return None
        return runs.outcome(target, args, kwargs)

    return asked


@torch.no_grad()
def test_what_does_not_run_is_named_and_the_others_are_lowered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lower_precision, "has_instructions", lambda *_: True)
    monkeypatch.setattr(lower_precision, "outcome", refusing("conv3d", "matmul"))
    monkeypatch.setattr(network, "pays", lambda *_: True)
    model, x = Kinds().eval(), torch.randn(2, 4, 6, 5)
    fast = optimize(model, (x,), torch.bfloat16)
    assert distance(fast(x), model(x)) < TOLERANCES[torch.bfloat16]
    reasons = " ".join(report(fast).left)
    assert "conv3d does not run in torch.bfloat16 here (volume)" in reasons
    assert "matmul does not run in torch.bfloat16 here (matmul)" in reasons
    assert report(fast).matched == 3
    monkeypatch.setattr(
        lower_precision, "outcome", refusing("conv1d", "conv2d", "conv3d", "linear", "matmul")
    )
    fast = optimize(model, (x,), torch.bfloat16)
    assert distance(fast(x), model(x)) < REORDERED
    assert "no layer in torch.bfloat16: the network runs in float32" in fast.explain()


@torch.no_grad()
def test_many_layers_of_a_kind_are_counted_and_some_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_precision, "outcome", refusing("conv2d"))
    monkeypatch.setattr(lower_precision, "has_instructions", lambda *_: True)
    model, inputs = small()
    left = report(optimize(model, inputs, torch.bfloat16)).left
    names = "conv2d does not run in torch.bfloat16 here (first, a.conv1, a.shortcut, ...)"
    assert left[names] == 8, left


def lowered(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """The graph of a function, its products in bfloat16."""
    found = traced(function, *inputs)
    lower_precision.lower_precision(found.gm, PassContext(dtype=torch.bfloat16))
    return found.gm


@pytest.fixture
def as_if_able(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_precision, "has_instructions", lambda *_: True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_what_has_no_graph_falls_back_to_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] == 4 and x.mean() < -9:
                raise RuntimeError("their own")
            return torch.lerp(self.conv(x), x, 0.5)

    model, x = Branch().eval(), torch.randn(2, 4, 5, 3)
    able = "stepfuse.engine.compile.without_graph.has_instructions"
    monkeypatch.setattr(able, lambda *_: True)
    with pytest.raises(RuntimeError, match="their own"):
        optimize(model, (x - 100,), dtype)
    fast = optimize(model, (x,), dtype)
    assert f"the network runs in float32: RuntimeError in {dtype}" in fast.explain()
    with pytest.raises(RuntimeError, match="their own"):
        fast(x - 100)
    assert distance(fast(x), model(x)) < REORDERED
    monkeypatch.setattr(able, lambda *_: False)
    fast = optimize(model, (x,), dtype)
    assert distance(fast(x), model(x)) < REORDERED
    assert f"runs in float32: no instructions for {dtype} on this CPU" in fast.explain()


@pytest.mark.usefixtures("as_if_able")
def test_random_numbers_are_those_of_the_model() -> None:
    x = torch.randn(2, 3, 4)

    def function(x: Tensor) -> Tensor:
        y = x @ x.mT
        return y * 0 + torch.rand_like(y)

    state = torch.get_rng_state()
    gm = lowered(function, x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    expected = function(x)
    torch.manual_seed(3)
    assert torch.equal(gm(x)[0], expected)


@pytest.mark.usefixtures("as_if_able")
def test_operators_of_others_get_the_dtypes_they_always_had() -> None:
    seen: list[torch.dtype] = []
    library = torch.library.Library("precision_of_others", "DEF")
    library.define("op(Tensor x) -> Tensor")

    def run(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x + 1

    library.impl("op", run, "CPU")
    library.impl("op", lambda x: torch.empty_like(x), "Meta")
    x = torch.randn(2, 3, 4)
    gm = lowered(lambda x: torch.ops.precision_of_others.op(x @ x.mT), x)
    assert distance(gm(x)[0], x @ x.mT + 1) < TOLERANCES[torch.bfloat16]
    assert seen == [torch.float32]
    library._destroy()


@pytest.mark.usefixtures("as_if_able")
def test_operands_of_one_dtype_have_one_again_and_numbers_follow() -> None:
    x, number = torch.randn(2, 3, 4), torch.tensor(0.5)

    def function(x: Tensor, number: Tensor) -> Tensor:
        y = x @ x.mT
        return (y * number).sum() + torch.addcmul(y, x @ x.mT, x[..., :3])

    gm = lowered(function, x, number)
    (product,) = calls(gm, aten.mul.Tensor)
    assert value(product).dtype is torch.bfloat16
    (sums,) = calls(gm, aten.addcmul.default)
    assert {value(n).dtype for n in sums.all_input_nodes} == {torch.float32}
    assert distance(gm(x, number)[0], function(x, number)) < TOLERANCES[torch.bfloat16]


def test_an_operator_is_asked_once_per_dtype_and_layout() -> None:
    asked = []

    def target(x: Tensor, y: list[int]) -> Tensor:
        asked.append((x.stride(), x.dtype, bool(x.any())))
        if x.dtype is torch.float16:
            raise NotImplementedError("no kernel")
        return x[0]

    x = torch.ones(2, 3)
    for _ in range(2):
        assert runs.runs(target, x, [1])
        assert runs.runs(target, x.t(), [1])
        assert runs.runs(target, x[:1].expand(4, 3), y=[1])
        assert not runs.runs(target, x.half(), [1])
    assert asked == [
        ((3, 1), torch.float32, False),
        ((1, 3), torch.float32, False),
        ((0, 1), torch.float32, False),
        ((3, 1), torch.float16, False),
    ]


_LESSER_CASES = (
    "one-head attention", "attention of two heads", "multihead attention", "avg_pool3d", "conv1d",
    "transpose2d", "transpose3d", "depthwise", "groups", "lerp", "linear", "nearest", "einsum",
)  # fmt: skip


def test_on_a_processor_with_less() -> None:
    """oneDNN and PyTorch restricted to AVX2 refuse what this processor may have."""
    test = f"{__file__}::{test_every_operator_after_a_lowered_layer.__name__}"
    chosen = [f"{test}[timed-{name}-{dtype}]" for name in _LESSER_CASES for dtype in DTYPES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        cwd=Path(__file__).parents[4],
        env={**os.environ, **LESSER},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(chosen)} passed" in done.stdout
