"""Counter-based noise against torch.randn and against writing as many bytes.

python -m stepfuse.bench.bench_philox [--json FILE] [--match TEXT] [--no-compile] [--device cuda]
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfuse.bench import harness
from stepfuse.bench.suite import Timed
from stepfuse.kernels import philox

TITLE = "philox.normal: x_T of every sample from its seed and number"
SHAPES = [
    ("DDPM-CIFAR", (128, 3, 32, 32)),
    ("ADM-64", (64, 3, 64, 64)),
    ("SD-1.5", (16, 4, 64, 64)),
]
TOLERANCE = 1e-6
COLUMNS = {"eager": "vs torch.randn"}


def case(
    model: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> harness.Case:
    """One shape and dtype."""

    def make() -> dict[str, Any]:
        buffer = torch.empty(shape, dtype=dtype, device=device)
        return {"sample": torch.arange(shape[0], device=device), "buffer": buffer}

    def ours(inputs: dict[str, Any], out: Tensor | None = None) -> Tensor:
        return philox.normal(7, inputs["sample"], philox.INITIAL, shape[1:], dtype=dtype, out=out)

    def into(inputs: dict[str, Any]) -> Tensor:
        return ours(inputs, inputs["buffer"])

    def verify() -> None:
        sample = torch.arange(shape[0], device=device)
        exact = philox.normal(
            7, sample, philox.INITIAL, shape[1:], "reference", dtype=torch.float64
        )
        harness.assert_close(ours(make()), exact, TOLERANCE, "philox.normal")

    return harness.Case(
        f"{model} {'x'.join(map(str, shape))}",
        dtype,
        make,
        {
            harness.OURS: ours,
            harness.INTO: into,
            "eager": lambda inputs: torch.randn(shape, dtype=dtype, device=device),
        },
        torch.Size(shape).numel() * dtype.itemsize,
        verify,
        device=device,
    )


def cases(device: str = "cpu") -> Iterator[harness.Case]:
    """Every case, made when its turn comes."""
    for (model, shape), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        yield case(model, shape, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "shape"), SHAPES)
def test_philox(timed: Timed, model: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    timed.case(case(model, shape, dtype))


main = functools.partial(harness.run, TITLE, cases, COLUMNS)

if __name__ == "__main__":
    main()
