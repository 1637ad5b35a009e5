"""Measurements: what is read between them, what they hold, what they leave behind."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from stepfuse.engine.compile import stopwatch
from stepfuse.engine.compile.stopwatch import (
    best_times,
    blank_filters,
    reading,
    scratch_operand,
    trial,
)
from stepfuse.kernels.filters import FORMS, Form, filters
from stepfuse.kernels.products import vector_channels
from stepfuse.kernels.registration import eager


class Seen(TorchDispatchMode):
    """Records sizes of what is read by a sum, and bytes of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.summed: list[int] = []
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.sum:
            self.summed.append(args[0].numel())
        made = [leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *made])
        return result


def test_caches_are_emptied_by_reading_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_CACHE", 4 * 1000)
    fake = FakeTensorMode().from_tensor(torch.ones(9000))
    integers = torch.ones(8000, dtype=torch.int64)
    weights = [torch.ones(300), nn.Parameter(torch.ones(7, 100)), torch.ones(200), torch.ones(500)]
    warm = torch.ones(11)
    with reading([fake, integers, *weights]), Seen() as seen:
        best_times([lambda: None, lambda: None], 2, warm=warm)
    # largest first, until they exceed the cache: 2800 and 2000 bytes; three rounds of two runs
    assert seen.summed == [700, 500, 11] * 6
    assert seen.largest <= 8, "only sums are made, no memory to read"
    with Seen() as seen:
        best_times([lambda: None], 1, warm=warm)
    assert seen.summed == [11, 11], "outside there are no weights"


def test_what_is_warm_is_left_so() -> None:
    with reading([torch.ones(100)]), Seen() as seen:
        times = best_times([lambda: None, lambda: None], 3)
    assert seen.summed == []
    assert all(0 <= seconds < 1 for seconds in times)


def test_a_trial_runs_once_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    trimmed: list[bool] = []
    monkeypatch.setattr(stopwatch, "trim", lambda: trimmed.append(held[-1]() is None))

    @trial
    def seconds(size: int) -> int:
        tensor = torch.ones(size)
        held.append(weakref.ref(tensor))
        return int(tensor.sum())

    assert [seconds(5), seconds(7), seconds(5)] == [5, 7, 5]
    assert len(held) == 2
    assert trimmed == [True, True], "after every trial, when its tensors are gone"


def test_a_scratch_operand_is_memory_of_a_weight_where_one_is_large_enough() -> None:
    weights = [torch.ones(30), torch.ones(7, 100), torch.ones(1000).view(10, 100).t()]
    with reading(weights):
        lent = scratch_operand(1400, torch.bfloat16)
        assert lent.data_ptr() == weights[1].data_ptr()
        assert (lent.shape, lent.dtype) == ((1400,), torch.bfloat16)
        assert torch.equal(
            scratch_operand(1401, torch.bfloat16), torch.zeros(1401, dtype=torch.bfloat16)
        )
    assert torch.equal(scratch_operand(3, torch.float32), torch.zeros(3))


def test_what_is_hopeless_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    runs = [0, 0, 0]

    def taking(i: int, seconds: float) -> None:
        runs[i] += 1
        now[0] += seconds

    times = best_times([lambda: taking(0, 2.0), lambda: taking(1, 1.4), lambda: taking(2, 1.0)], 5)
    assert times == pytest.approx([2.0, 1.4, 1.0])
    assert runs == [3, 6, 6], "one to warm up, two measured, and the rest for those in reach"


@pytest.mark.skipif(not vector_channels(), reason="needs the C++ module (a C++ compiler)")
@pytest.mark.parametrize("form", FORMS)
def test_blank_filters_have_the_shape_of_real_ones(form: Form) -> None:
    weight = torch.randn(64, 32, *((1, 1) if form == "dense" else (3, 3)))
    real = filters(weight, form, torch.float32)
    blank = blank_filters(weight.shape, (form,), torch.float32)[form]
    assert blank.shape == real.shape
    assert blank.dtype == real.dtype


class Passing(TorchFunctionMode):
    """Watches and changes nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_trial_is_not_watched_by_whoever_compiles() -> None:
    """A sampler compiles under a mode of its own; there our kernels would take the long way."""
    found = []

    @trial
    def seconds(count: int) -> float:
        found.append(eager(torch.ones(count)))
        return 1.0

    with Passing(), Passing(), Seen() as seen, torch.no_grad():
        assert not eager(torch.ones(1))
        seconds(2)
        assert seen in _get_current_dispatch_mode_stack()
        assert torch._C._len_torch_function_stack() == 2
    assert found == [True]
