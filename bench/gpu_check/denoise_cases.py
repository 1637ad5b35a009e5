"""Calls of denoise_step, and what their results may differ by from the float64 formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfuse.bench.gpu_check.against import Layout, Poisoned, off, placed
from stepfuse.kernels import philox
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.memory import history_dtype
from stepfuse.kernels.reference.denoise_step import guided, remembered, update
from stepfuse.kernels.step_row import COLUMNS, HISTORY_COLUMNS, Column, HistoryColumn

# A float32 expression of at most ten operations: each rounds by 2^-24 of what it has so far, which
# the sum of the terms' absolute values bounds whatever the order and whether or not it is fused.
ARITHMETIC = 10 * 2.0**-24
# exp in float32, by approximation: 2 units in the last place, and its argument's rounding below 8.
EXPONENTIAL = 2e-6
NORMAL = 1e-6  # Box-Muller in float32 against the definition in float64
ROW = 3  # of a table of five


@dataclass(frozen=True)
class Variant:
    """Which optional parts of an update take part."""

    name: str
    noise: str = "none"  # or "given", "drawn"
    guidance: str = "none"  # or "batch", "two"
    learned: bool = False
    slots: int = 0  # of a history, of which one holds NaN that is not read


VARIANTS = (
    Variant("plain"),
    Variant("given", noise="given"),
    Variant("drawn", noise="drawn"),
    Variant("guided", guidance="two"),
    Variant("guided-batch", noise="drawn", guidance="batch"),
    Variant("everything", noise="drawn", guidance="two", learned=True),
    Variant("history", slots=2),
    Variant("everything-history", noise="drawn", guidance="two", learned=True, slots=3),
)


def denoise(
    variant: Variant,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    device: torch.device,
    backend: str,
    generator: torch.Generator,
) -> list[str]:
    """One call into other tensors and one in place; a line for whatever is wrong."""
    given = _arguments(variant, shape, dtype, layout, generator)
    sent = {
        name: torch.empty_like(v, device=device).copy_(v) if isinstance(v, Tensor) else v
        for name, v in given.items()
    }
    out, x0_out = Poisoned(sent["x"]), Poisoned(sent["x"])
    before = sent["history"].clone() if variant.slots else None
    denoise_step(**sent, out=out.tensor, x0_out=x0_out.tensor, backend=backend)
    x_s, x0, allowed, allowed_x0 = exact(given)
    found = out.problems("x_s") + off("x_s", out.tensor, x_s, allowed)
    found += x0_out.problems("x0") + off("x0", x0_out.tensor, x0, allowed_x0)
    if before is not None:
        for slot, (new, near) in enumerate(zip(*remembered_now(given), strict=True)):
            found += off(f"history {slot}", sent["history"][slot], new, near)
        sent["history"].copy_(before)
    denoise_step(**sent, inplace=True, backend=backend)
    if not torch.equal(sent["x"], out.tensor):
        found.append("in place differs from out of place")
    return found


def _arguments(
    variant: Variant,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout,
    generator: torch.Generator,
) -> dict[str, Any]:
    def drawn(*sizes: int) -> Tensor:
        return placed(torch.randn(sizes, generator=generator).to(dtype), layout)

    count, channels = shape[:2]
    wide = (count, channels * (2 if variant.learned else 1), *shape[2:])
    both = (2 * count, *wide[1:]) if variant.guidance == "batch" else wide
    given: dict[str, Any] = {"x": drawn(*shape), "model_output": drawn(*both)}
    if variant.guidance == "two":
        given["uncond_output"] = drawn(*wide)
    if variant.noise == "given":
        given["noise"] = drawn(*shape)
    elif variant.noise == "drawn":
        numbers = torch.randint(-(2**63), 2**63 - 1, (2, count), generator=generator)
        given |= {"seed": numbers[0], "sample": numbers[1]}
    # rows no sampler would make: every column matters, and x0 is clipped for some elements
    table = torch.randn(5, COLUMNS, generator=generator)
    table[:, Column.CLIP] = 0.5 + torch.rand(5, generator=generator)
    table[:, Column.SIGMA] = 0.2 + torch.rand(5, generator=generator)
    table[:, Column.TIMESTEP] = torch.randint(0, 1000, (5,), generator=generator).float()
    if variant.slots:
        given |= memory(variant.slots, given["x"], generator)
    return given | {
        "table": table,
        "step": torch.tensor([ROW]),
        "learned_variance": variant.learned,
    }


def memory(slots: int, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Any]:
    """A history beside x and five rows that read all of it but the last slot, and write there.

    What is not read is NaN.
    """
    like = torch.empty_like(x, dtype=history_dtype(x.dtype))
    history = torch.stack([like] * slots).as_strided((slots, *x.shape), (x.numel(), *x.stride()))
    history.copy_(torch.randn(history.shape, generator=generator))
    rows = torch.randn(5, HISTORY_COLUMNS, generator=generator)
    rows[:, HistoryColumn.C_H0 + slots - 1] = 0
    history[slots - 1] = torch.nan
    rows[:, HistoryColumn.WRITE] = slots - 1
    return {"history": history, "history_table": rows}


def remembered_now(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(what the history holds after the call, allowed error), [K, N, C, ...] each in float64.

    Slots that are neither read nor written keep their NaN.
    """
    history, row = given["history"].double().clone(), given["table"][int(given["step"])].double()
    memory = given["history_table"][int(given["step"])].double()
    allowed = torch.zeros_like(history)
    _, x0, _, allowed_x0 = exact(given)
    output, size = _guided(given, row)
    write = int(memory[HistoryColumn.WRITE])
    if 0 <= write < len(history):
        weights = memory.abs()
        history[write] = (
            memory[HistoryColumn.H_X] * given["x"].double()
            + memory[HistoryColumn.H_O] * output
            + memory[HistoryColumn.H_0] * x0
        )
        allowed[write] = weights[HistoryColumn.H_0] * allowed_x0 + ARITHMETIC * (
            weights[HistoryColumn.H_X] * given["x"].double().abs()
            + weights[HistoryColumn.H_O] * size
            + weights[HistoryColumn.H_0] * x0.abs()
        )
    return history, allowed


def _guided(given: dict[str, Any], row: Tensor) -> tuple[Tensor, Tensor]:
    """(o, the absolute values it is made of), [N, C, ...]."""
    x, output, uncond = given["x"], given["model_output"], given.get("uncond_output")
    if len(output) == 2 * len(x):
        uncond, output = output.chunk(2)
    channels = x.shape[1]
    size = output[:, :channels].double().abs()
    if uncond is not None:
        base = uncond[:, :channels].double().abs()
        size = base + row[Column.GUIDANCE].abs() * (size + base)
    return guided(output, uncond, row, channels), size


def exact(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_s, x0, allowed error of x_s, of x0) in float64, of a call with these arguments."""
    x, output, uncond = given["x"], given["model_output"], given.get("uncond_output")
    count, channels, learned = len(x), x.shape[1], given.get("learned_variance", False)
    if len(output) == 2 * count:
        uncond, output = output.chunk(2)
    row = given["table"][int(given["step"])].double()
    noise, drawn = given.get("noise"), 0.0
    if "seed" in given:
        at = int(row[Column.TIMESTEP])
        noise = philox.normal(
            given["seed"], given["sample"], at, x.shape[1:], "reference", dtype=torch.float64
        )
        drawn = NORMAL
    x_s, x0 = update(x, output, uncond, row, noise, learned)
    _, size = _guided(given, row)
    weights, image = row.abs(), x.double().abs()
    x0_size = weights[Column.P_X] * image + weights[Column.P_O] * size
    terms = weights[Column.C_X] * image + weights[Column.C_O] * size + weights[Column.C_0] * x0_size
    if "history" in given:
        beside = given["history_table"][int(given["step"])].double()
        x_s = x_s + remembered(given["history"].double(), beside)
        terms = terms + remembered(given["history"].double().abs(), beside.abs())
    allowed = ARITHMETIC * terms
    if noise is not None:
        std = weights[Column.SIGMA]
        if learned:
            w = output[:, channels:].double()
            std = std * torch.exp(0.5 * (row[Column.L_0] + row[Column.L_1] * w))
        allowed = allowed + std * (drawn + (ARITHMETIC + EXPONENTIAL) * noise.double().abs())
    return x_s, x0, allowed, ARITHMETIC * x0_size
