"""Calls of denoise_step, and what their results may differ by from the float64 formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from op_cases import Layout, assert_within, placed, random_like
from torch import Tensor

from stepfuse.bench.gpu_check.denoise_cases import exact
from stepfuse.kernels.step_row import COLUMNS, Column


@dataclass(frozen=True)
class Variant:
    """Which of the optional parts of an update take part."""

    name: str
    noise: str = "none"  # or "given", "drawn"
    guidance: str = "none"  # or "batch", "two"
    learned: bool = False
    wide: bool = False  # the model gives a variance, used or not
    x0: bool = False

    def __str__(self) -> str:
        return self.name


VARIANTS = [
    Variant("plain"),
    Variant("x0", x0=True),
    Variant("given", noise="given"),
    Variant("drawn", noise="drawn", x0=True),
    Variant("guided", guidance="two"),
    Variant("guided-batch", guidance="batch", noise="drawn"),
    Variant("unused-variance", wide=True, noise="given"),
    Variant("learned", noise="given", learned=True, wide=True),
    Variant("everything", noise="drawn", guidance="two", learned=True, wide=True, x0=True),
    Variant("everything-batch", noise="given", guidance="batch", learned=True, wide=True, x0=True),
]
HEAVY = VARIANTS[-2]


def random_table(rows: int = 5) -> Tensor:
    """Rows no sampler would make: every column matters, and x0 is clipped for some elements."""
    table = torch.randn(rows, COLUMNS)
    table[:, Column.CLIP] = 0.5 + torch.rand(rows)
    table[:, Column.SIGMA] = 0.2 + torch.rand(rows)
    table[:, Column.TIMESTEP] = torch.randint(0, 1000, (rows,)).float()
    return table


def arguments(
    variant: Variant,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Layout = "contiguous",
    output_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one call."""
    count, channels = shape[:2]
    wide = (count, channels * (2 if variant.wide else 1), *shape[2:])
    output = random_like(wide, output_dtype or dtype, layout)
    given: dict[str, Any] = {"x": random_like(shape, dtype, layout), "model_output": output}
    if variant.guidance == "two":
        given["uncond_output"] = random_like(wide, output.dtype, layout)
    elif variant.guidance == "batch":
        both = torch.cat([random_like(wide, output.dtype), output])
        given["model_output"] = placed(both, layout)
    if variant.noise == "given":
        given["noise"] = random_like(shape, dtype, layout)
    elif variant.noise == "drawn":
        given["seed"] = torch.randint(-(2**63), 2**63 - 1, (count,))
        given["sample"] = torch.randint(-(2**63), 2**63 - 1, (count,))
    if variant.learned:
        given["learned_variance"] = True
    given |= {"table": random_table(), "step": torch.tensor([3]), "return_x0": True}
    return given


def check(given: dict[str, Any], x_s: Tensor, x0: Tensor | None) -> None:
    """Both results are within their allowance."""
    exact_x_s, exact_x0, allowed, allowed_x0 = exact(given)
    assert_within(x_s, exact_x_s, allowed, "x_s")
    if x0 is not None:
        assert_within(x0, exact_x0, allowed_x0, "x0")
