"""denoise_step with a history, on every backend: what is read, what is written, what is not."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from denoise_cases import HEAVY, VARIANTS, Variant, arguments, check
from op_cases import (
    COMPILED,
    INTERPRETER,
    MODES,
    SIMULATED,
    Layout,
    Poisoned,
    across,
    assert_within,
    everywhere,
    placed,
)
from torch import Tensor

from stepfuse.bench.gpu_check.denoise_cases import memory, remembered_now
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.step_row import HISTORY_COLUMNS, Column, HistoryColumn

OPERATORS = torch.ops.stepfuse
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 3, 1, 1), (1, 4, 31, 33), (3, 2), (2, 3, 17), (1, 2, 3, 5, 7)]
CASES = [
    *itertools.product([(2, 3, 7, 9), (2, 4, 8, 8)], VARIANTS, [2], DTYPES),
    *itertools.product(SHAPES, [HEAVY], [1, 2, 3], DTYPES),
]
INTERPRETED = [
    *itertools.product([(2, 3, 7, 9)], VARIANTS, [2], DTYPES[:1]),
    *itertools.product(SHAPES, [HEAVY], [1, 3], DTYPES[:2]),
]
SM_80 = [((2, 3, 7, 9), HEAVY, 3, torch.float32), ((3, 2), VARIANTS[0], 1, torch.float16)]
SM_90 = [((2, 4, 8, 8), HEAVY, 2, torch.bfloat16)]


def with_history(given: dict[str, Any], slots: int) -> dict[str, Any]:
    return given | memory(slots, given["x"])


def checked(given: dict[str, Any], backend: str, **more: Any) -> None:
    """One call; the history is compared, too, and slots that nobody wrote keep their NaN."""
    expected, allowed = remembered_now(given)
    before = given["history"].clone()
    call = given | {"history": before}
    x_s, x0 = denoise_step(**call, **more, backend=backend)
    check(given, x_s, x0)
    for found, exact, near in zip(before, expected, allowed, strict=True):
        if bool(exact.isnan().all()):
            assert bool(found.isnan().all())
        else:
            assert_within(found, exact, near, "history")


@across(
    "shape,variant,slots,dtype",
    (COMPILED, CASES),
    (INTERPRETER, INTERPRETED),
    (SIMULATED[:1], SM_80),
    (SIMULATED[1:], SM_90),
)
def test_matches_the_float64_reference(
    backend: str, shape: tuple[int, ...], variant: Variant, slots: int, dtype: torch.dtype
) -> None:
    given = with_history(arguments(variant, shape, dtype), slots)
    checked(given, backend, out=Poisoned(given["x"]).tensor)


@everywhere()
@pytest.mark.parametrize("read", list(itertools.product([0.0, 0.7], repeat=3)), ids=str)
@pytest.mark.parametrize("write", [-1, 0, 1, 2])
def test_slots_of_weight_zero_may_hold_nan(
    backend: str, read: tuple[float, ...], write: int
) -> None:
    """Whichever are read and written, one that is both among them."""
    given = with_history(arguments(VARIANTS[0], (1, 3, 4, 4), torch.float32), 3)
    given["history_table"][:, :3] = torch.tensor(read)
    given["history_table"][:, HistoryColumn.WRITE] = write
    given["history"].copy_(torch.randn(3, 1, 3, 4, 4))
    for slot, weight in enumerate(read):
        if weight == 0:
            given["history"][slot] = math.nan
    checked(given, backend)


@everywhere()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_an_empty_row_of_history_changes_nothing(backend: str, variant: Variant) -> None:
    """Bit for bit the step without one, with a history of NaN."""
    given = arguments(variant, (2, 3, 7, 9), torch.float32)
    x_s, x0 = denoise_step(**given, backend=backend)
    nothing = with_history(given, 3)
    nothing["history"].fill_(math.nan)
    nothing["history_table"].zero_()
    nothing["history_table"][:, HistoryColumn.WRITE] = -1
    same, same_x0 = denoise_step(**nothing, backend=backend)
    assert torch.equal(same, x_s)
    assert torch.equal(same_x0, x0)
    assert bool(nothing["history"].isnan().all())


LAYOUTS: list[tuple[tuple[int, ...], Layout]] = [
    ((2, 3, 7, 9), "channels_last"),
    ((1, 2, 3, 5, 7), "channels_last"),
]


@across("shape,layout", (MODES, LAYOUTS))
@pytest.mark.parametrize("variant", [VARIANTS[0], HEAVY], ids=str)
def test_channels_last(
    backend: str, shape: tuple[int, ...], layout: Layout, variant: Variant
) -> None:
    given = with_history(arguments(variant, shape, torch.float32, layout), 2)
    assert not given["history"][0].is_contiguous()
    checked(given, backend)


@everywhere()
def test_a_view_of_x_in_another_layout_takes_a_contiguous_history(backend: str) -> None:
    given = arguments(VARIANTS[3], (2, 3, 7, 9), torch.float32, "transposed")
    given |= memory(2, torch.empty(2, 3, 7, 9))
    checked(given, backend)


@everywhere()
@pytest.mark.parametrize("output_dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_half_precision_model(backend: str, output_dtype: torch.dtype) -> None:
    given = arguments(HEAVY, (2, 3, 7, 9), torch.float32, output_dtype=output_dtype)
    given["model_output"] = placed(given["model_output"], "channels_last")
    checked(with_history(given, 2), backend)


@everywhere()
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_in_place_equals_out_of_place(backend: str, variant: Variant) -> None:
    given = with_history(arguments(variant, (2, 3, 7, 9), torch.float32), 3)
    other = given | {"history": given["history"].clone(), "x": given["x"].clone()}
    x_s, _ = denoise_step(**given, backend=backend)
    over, _ = denoise_step(**other, inplace=True, backend=backend)
    assert over is other["x"]
    assert torch.equal(over, x_s)
    assert torch.equal(other["history"], given["history"])


@everywhere(COMPILED)
def test_neither_threads_nor_batch_change_a_bit(backend: str) -> None:
    given = with_history(arguments(HEAVY, (7, 3, 31, 33), torch.float32), 2)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        call = given | {"history": given["history"].clone()}
        results.append((*denoise_step(**call, backend=backend), call["history"]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    names = ("x", "model_output", "uncond_output", "seed", "sample")
    one = given | {name: given[name][3:4] for name in names}
    one["history"] = given["history"][:, 3:4].clone()
    x_s, _ = denoise_step(**one, backend=backend)
    assert torch.equal(x_s, results[0][0][3:4])
    assert torch.equal(one["history"][1], results[0][2][1, 3:4])


def test_float64_keeps_its_digits() -> None:
    given = arguments(HEAVY, (2, 3, 5, 5), torch.float64)
    given["table"] = given["table"].double() / 3
    given["table"][:, Column.TIMESTEP] = 7
    given = with_history(given, 2)
    given["history_table"] = given["history_table"].double()
    given["history_table"][:, : HistoryColumn.WRITE] /= 3
    expected, _ = remembered_now(given)
    call = given | {"history": given["history"].clone()}
    denoise_step(**call)
    assert call["history"].dtype == torch.float64
    torch.testing.assert_close(call["history"], expected, rtol=1e-14, atol=1e-14)


def test_it_is_an_operator_that_says_what_it_writes() -> None:
    given = with_history(arguments(HEAVY, (2, 4, 5, 3), torch.float32), 2)
    given["history"].copy_(torch.randn(2, 2, 4, 5, 3))
    names = ("x", "model_output", "uncond_output", "table", "step", "noise", "seed", "sample")
    args = (*(given.get(name) for name in names), True, "auto")
    beside = {"history": given["history"], "history_table": given["history_table"]}
    outs = {"out": torch.empty_like(given["x"]), "x0_out": torch.empty_like(given["x"])}
    torch.library.opcheck(OPERATORS.denoise_step_out.default, args, outs | beside)
    torch.library.opcheck(OPERATORS.denoise_step_.default, (*args, None), beside)


def test_compiles_as_one_graph() -> None:
    def steps(x: Tensor, output: Tensor, history: Tensor) -> Tensor:
        x = denoise_step(x, output, table, 1, history=history, history_table=rows)
        denoise_step(x, output, table, 2, history=history, history_table=rows, inplace=True)
        return x + history.sum()

    given = with_history(arguments(VARIANTS[0], (2, 4, 5, 3), torch.float32), 2)
    given["history"].fill_(1.0)
    table, rows = given["table"], given["history_table"]
    history = given["history"].clone()
    expected = steps(given["x"], given["model_output"], given["history"])
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given["x"], given["model_output"], history), expected)
    assert torch.equal(history, given["history"])


def test_a_history_records_no_gradient() -> None:
    given = with_history(arguments(VARIANTS[0], (2, 3, 4, 4), torch.float32), 1)
    given["x"].requires_grad_()
    with pytest.raises(ValueError, match="history= record no gradient"):
        denoise_step(**given)
    version = given["history"]._version
    with torch.no_grad():
        denoise_step(**given)
    assert given["history"]._version > version


X = torch.zeros(2, 3, 4, 4)
ROWS = torch.zeros(5, HISTORY_COLUMNS)


@pytest.mark.parametrize(
    ("history", "rows", "error", "message"),
    [
        (torch.zeros(2, 2, 3, 4, 4), None, ValueError, "give both or neither"),
        (None, ROWS, ValueError, "give both or neither"),
        (3, ROWS, TypeError, "history must be a tensor; got int 3"),
        (torch.zeros(2, 2, 3, 4, 4), 3, TypeError, "history_table must be a tensor; got int 3"),
        (X, ROWS, ValueError, r"history must have shape \[K, 2, 3, 4, 4\] with K in 1 \.\. 3"),
        (torch.zeros(4, 2, 3, 4, 4), ROWS, ValueError, r"got \(4, 2, 3, 4, 4\)"),
        (torch.zeros(0, 2, 3, 4, 4), ROWS, ValueError, r"got \(0, 2, 3, 4, 4\)"),
        (torch.zeros(1, 2, 3, 4, 4).double(), ROWS, TypeError, "must be torch.float32 for x in"),
        (torch.zeros(1, 2, 3, 4, 4).half(), ROWS, TypeError, "must be torch.float32 for x in"),
        (torch.zeros(1, 2, 3, 4, 8)[..., ::2], ROWS, ValueError, "slot after slot of contiguous"),
        (torch.zeros(2, 2, 2, 3, 4, 4)[:, 0], ROWS, ValueError, "slot after slot of contiguous"),
        (torch.zeros(1, 2, 3, 4, 4), ROWS[:4], ValueError, r"shape \[5, 8\], as many rows as"),
        (torch.zeros(1, 2, 3, 4, 4), ROWS[:, :7], ValueError, r"got \(5, 7\)"),
    ],
)
def test_what_is_no_history(history: Any, rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        denoise_step(X, X, torch.ones(5, 16), 1, history=history, history_table=rows)


def test_a_history_shares_no_memory() -> None:
    buffer = torch.zeros(400)
    x, history = buffer[:96].view(2, 3, 4, 4), buffer[90:186].view(1, 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"history must not overlap (out|x) in memory"):
        denoise_step(x, X, torch.ones(5, 16), 1, history=history, history_table=ROWS, inplace=True)
