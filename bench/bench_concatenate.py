"""concatenate against torch.cat, eager and compiled, and against a copy.

    python -m stepfuse.bench.bench_concatenate [--json FILE] [--match TEXT] [--no-compile]

What the decoders of DDPM's CIFAR-10 network, ADM's 64x64 network and Stable Diffusion 1.5 put side
by side, channels-last.
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
from stepfuse.kernels.concatenate import concatenate
from stepfuse.kernels.reference import concatenate as reference

TITLE = "concatenate: y = cat((a, b), 1), channels-last"
SHAPES = [  # samples, channels of the one and of the other, height, width
    ("DDPM-CIFAR", (16, 256, 128, 32, 32)),
    ("ADM-64", (4, 384, 192, 64, 64)),
    ("SD-1.5", (2, 640, 320, 64, 64)),
]
COLUMNS = {"eager": "vs eager", "compile": "vs compile"}


def expression(inputs: dict[str, Any]) -> Tensor:
    """What a model without us runs."""
    return torch.cat([inputs["a"], inputs["b"]], 1)


def case(model: str, shape: tuple[int, ...], dtype: torch.dtype) -> harness.Case:
    """One shape and dtype."""
    n, first, second, *size = shape

    def image(channels: int) -> Tensor:
        x = torch.randn(n, channels, *size).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def make() -> dict[str, Any]:
        return {"a": image(first), "b": image(second), "buffer": image(first + second)}

    def ours(inputs: dict[str, Any], out: Tensor | None = None) -> Tensor:
        return concatenate([inputs["a"], inputs["b"]], out=out)

    def into(inputs: dict[str, Any]) -> Tensor:
        return ours(inputs, inputs["buffer"])

    def verify() -> None:
        inputs = make()
        reference.run([inputs["a"], inputs["b"]], inputs["buffer"])
        harness.assert_close(ours(inputs), inputs["buffer"], 0.0, "concatenate")

    traffic = 2 * n * (first + second) * torch.Size(size).numel() * dtype.itemsize
    candidates = {harness.OURS: ours, harness.INTO: into, "eager": expression}
    label = f"{model} {'x'.join(map(str, shape))}"
    return harness.Case(label, dtype, make, candidates, traffic, verify, expression)


def cases(device: str = "cpu") -> Iterator[harness.Case]:
    """Every case, made when its turn comes; the kernel is one of the CPU alone."""
    for (model, shape), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        yield case(model, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "shape"), SHAPES)
def test_concatenate(timed: Timed, model: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    timed.case(case(model, shape, dtype))


main = functools.partial(harness.run, TITLE, cases, COLUMNS, ("cpu",))

if __name__ == "__main__":
    main()
