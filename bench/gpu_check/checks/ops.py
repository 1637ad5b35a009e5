"""Every op that runs on CUDA against its float64 reference on the CPU."""

from __future__ import annotations

from functools import partial

import torch

from stepfuse.bench.gpu_check.against import off
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.op_cases import NORMALISED, Case, Place, cases
from stepfuse.bench.gpu_check.parts import each, in_a_line, sticky
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.reference.denoise_step import update
from stepfuse.kernels.reference.group_norm_silu import formula
from stepfuse.kernels.step_row import COLUMNS, Column

STAND_IN = 7  # of so many cases, one runs where the CPU stands in
SHOWN = 20  # lines of one op in the list of what is wrong
_HEADROOM = 1.2  # of the memory that the largest tensors need


def run(context: Context) -> None:
    """All cases, then tensors of more than 2^31 elements."""
    place = Place(context.device, context.sized("triton", "auto"))
    chosen = cases()[:: context.sized(1, STAND_IN)]
    for op in dict.fromkeys(case.op for case in chosen):
        _run_op(context, place, op, [case for case in chosen if case.op == op])
    context.note("without a CUDA path", ["attention", "concatenate", "convolve"])
    large = {"large step": _large_step, "large norm": _large_norm}
    each(context, {name: partial(part, context, place) for name, part in large.items()})


def _run_op(context: Context, place: Place, op: str, chosen: list[Case]) -> None:
    wrong = 0
    for case in chosen:
        context.note("running", f"{op} {case.name}")
        try:
            problems = case.run(place)
            context.synchronize()
        except Exception as error:
            if sticky(error):
                raise
            problems = [in_a_line(error)]
        wrong += bool(problems)
        if problems and wrong <= SHOWN:
            context.expect(False, f"{op} {case.name}: {'; '.join(problems)}")
    if wrong > SHOWN:
        context.expect(False, f"{op}: {wrong - SHOWN} more cases are wrong")
    counts = context.facts.get("cases", {})
    context.note("cases", {**counts, op: {"cases": len(chosen), "wrong": wrong}})


def _fits(context: Context, name: str, size: int) -> bool:
    """Whether so many bytes are free; noted where they are not."""
    if context.stands_in:
        return True
    free = torch.cuda.mem_get_info(context.device)[0]
    if free < _HEADROOM * size:
        context.note(name, f"left out: needs {size / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    return bool(free >= _HEADROOM * size)


def _large_step(context: Context, place: Place) -> None:
    """denoise_step in place; the ends of the samples lie at offsets around and beyond 2^31."""
    shape = context.sized((3, 1, 2**15, 2**15 + 16), (3, 1, 64, 80))
    elements = shape[0] * shape[2] * shape[3]
    name = "denoise_step of more than 2^31 elements"
    if not _fits(context, name, 5 * elements):
        return
    x = torch.empty(shape, dtype=torch.bfloat16, device=place.device).normal_()
    output = torch.empty_like(x).normal_()
    table = torch.zeros(1, COLUMNS)
    for column, value in ((Column.P_X, 1.2), (Column.P_O, -0.7), (Column.C_X, 0.4)):
        table[0, column] = value
    table[0, Column.C_0], table[0, Column.CLIP] = 0.6, 1.0
    ends = (slice(None), slice(None), slice(-1, None))
    before, guess = x[ends].clone().cpu(), output[ends].cpu()
    denoise_step(x, output, table.to(place.device), 0, inplace=True, backend=place.backend)
    exact, _ = update(before.double(), guess.double(), None, table[0].double(), None, False)
    problems = off("the last rows", x[ends], exact, 2e-6 * (1 + exact.abs()))
    context.expect(not problems, f"{name}: {'; '.join(problems)}")
    context.note(name, f"{elements} elements")


def _large_norm(context: Context, place: Place) -> None:
    """group_norm_silu; the last group of the last sample lies beyond 2^31 elements."""
    shape = context.sized((5, 32, 4096, 4096 + 8), (2, 4, 32, 40))
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    name = "group_norm_silu of more than 2^31 elements"
    if not _fits(context, name, 4 * elements):
        return
    x = torch.empty(shape, dtype=torch.bfloat16, device=place.device).normal_()
    y = torch.full_like(x, torch.nan)
    group_norm_silu(x, None, None, shape[1], backend=place.backend, out=y)
    exact = formula(x[-1:, -1:].cpu().double(), None, None, 1, 1e-5, None, None, None, True)
    problems = off("the last group", y[-1:, -1:], exact, NORMALISED)
    problems += ["some elements are NaN"] if bool(y.view(-1)[:: 4096 + 7].isnan().any()) else []
    context.expect(not problems, f"{name}: {'; '.join(problems)}")
    context.note(name, f"{elements} elements")


CHECK = Check(
    "ops",
    "correctness",
    60.0,
    run,
    "Each op in fp32, bf16 and fp16, contiguous and NHWC, at odd sizes and in place, its outputs "
    "poisoned, against a float64 reference on the CPU.",
)
