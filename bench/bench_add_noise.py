"""add_noise against torch.randn_like, two multiplications and an add, and against a copy.

    python -m stepfuse.bench.bench_add_noise [--json FILE] [--match TEXT] [--device cuda]

With the noise drawn inside, and given; a timestep for each sample.
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
from stepfuse.kernels.add_noise import add_noise

TITLE = "add_noise: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps"
SHAPES = [
    ("DDPM-CIFAR", (128, 3, 32, 32)),
    ("ADM-64", (64, 3, 64, 64)),
    ("SD-1.5", (16, 4, 64, 64)),
]
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
TOLERANCE = 4e-6  # drawn normals are good to 1e-6, and the sum is of values up to 6
COLUMNS = {"eager": "vs eager", "compile": "vs compile"}


def given(inputs: dict[str, Any]) -> Tensor:
    """Two multiplications and an add, with coefficients looked up as training loops do."""
    return _mixed(inputs["x0"], inputs["noise"], inputs)


def drawn(inputs: dict[str, Any]) -> Tensor:
    """The same with torch's generator."""
    return _mixed(inputs["x0"], torch.randn_like(inputs["x0"]), inputs)


def _mixed(x0: Tensor, eps: Tensor, inputs: dict[str, Any]) -> Tensor:
    signal, sigma = inputs["signal"][inputs["t"]], inputs["sigma"][inputs["t"]]
    shape = (-1, *[1] * (x0.dim() - 1))
    return signal.view(shape) * x0 + sigma.view(shape) * eps


def case(
    model: str, shape: tuple[int, ...], dtype: torch.dtype, inside: bool, device: str = "cpu"
) -> harness.Case:
    """One shape and dtype, with the noise drawn inside or given."""
    count, abar = shape[0], ABAR.to(device)
    fixed = {
        "signal": abar.sqrt().to(dtype),
        "sigma": (1 - abar).sqrt().to(dtype),
        "seed": torch.full((count,), 7, device=device),
        "sample": torch.arange(count, device=device),
    }

    def make() -> dict[str, Any]:
        x0 = torch.randn(shape, device=device).to(dtype)
        noise = None if inside else torch.randn(shape, device=device).to(dtype)
        t = torch.randint(0, 1000, (count,), device=device)
        buffer = torch.empty_like(x0)
        return fixed | {"x0": x0, "noise": noise, "t": t, "buffer": buffer}

    def ours(inputs: dict[str, Any], out: Tensor | None = None) -> Any:
        x0, noise, t = inputs["x0"], inputs["noise"], inputs["t"]
        if not inside:
            return add_noise(x0, noise, t, abar, out=out)
        return add_noise(x0, None, t, abar, seed=inputs["seed"], sample=inputs["sample"], out=out)

    def into(inputs: dict[str, Any]) -> Any:
        return ours(inputs, inputs["buffer"])

    def verify() -> None:
        inputs = make()
        eps, abar_t = inputs["noise"], abar[inputs["t"]].view(-1, 1, 1, 1)
        if inside:
            counters = inputs["seed"], inputs["sample"], inputs["t"]
            eps = philox.normal(*counters, shape[1:], "reference", dtype=torch.float64)
        exact = abar_t.sqrt() * inputs["x0"].double() + (1 - abar_t).sqrt() * eps.double()
        harness.assert_close(ours(inputs), exact, TOLERANCE, "add_noise")

    size, tensors = torch.Size(shape).numel(), 2 if inside else 3
    expression = drawn if inside else given
    return harness.Case(
        f"{model} {'x'.join(map(str, shape))}",
        dtype,
        make,
        {harness.OURS: ours, harness.INTO: into, "eager": expression},
        tensors * size * dtype.itemsize,
        verify,
        expression,
        "drawn" if inside else "given",
        device,
    )


def cases(device: str = "cpu") -> Iterator[harness.Case]:
    """Every case, made when its turn comes."""
    for (model, shape), dtype, inside in itertools.product(
        SHAPES, (torch.float32, torch.bfloat16), (True, False)
    ):
        yield case(model, shape, dtype, inside, device)


@pytest.mark.parametrize("inside", [True, False], ids=["drawn", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "shape"), SHAPES)
def test_add_noise(
    timed: Timed, model: str, shape: tuple[int, ...], dtype: torch.dtype, inside: bool
) -> None:
    timed.case(case(model, shape, dtype, inside))


main = functools.partial(harness.run, TITLE, cases, COLUMNS)

if __name__ == "__main__":
    main()
