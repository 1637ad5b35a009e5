"""attention against F.scaled_dot_product_attention, eager and compiled, and against a copy.

    python -m stepfuse.bench.bench_attention [--json FILE] [--match TEXT] [--no-compile]

Attention of DDPM's CIFAR-10 network, ADM's 64x64 network and Stable Diffusion 1.5, over positions
and over the 77 words of a text; heads as the layers before leave them, side by side at a position.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stepfuse.bench import harness
from stepfuse.bench.suite import Timed
from stepfuse.kernels.attention import attention
from stepfuse.kernels.backends import BackendUnavailable
from stepfuse.kernels.products import why_not
from stepfuse.kernels.reference.attention import formula

TITLE = "attention: y = softmax(q k^T / sqrt(d)) v"
SHAPES = [  # samples, heads, queries, keys, width
    ("DDPM-CIFAR", (16, 1, 256, 256, 256)),
    ("ADM-64", (4, 6, 1024, 1024, 64)),
    ("SD-1.5", (2, 8, 1024, 1024, 80)),
    ("SD-1.5 text", (2, 8, 4096, 77, 40)),
]
# relative L2: float32 sums in another order; weights and results of 8 bits in bfloat16
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
COLUMNS = {"eager": "vs eager", "compile": "vs compile"}


def expression(inputs: dict[str, Any]) -> Tensor:
    """What a model without us runs."""
    return F.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"])


def case(model: str, shape: tuple[int, ...], dtype: torch.dtype) -> harness.Case:
    """One shape and dtype."""
    n, heads, queries, keys, width = shape

    def tokens(positions: int) -> Tensor:
        return torch.randn(n, positions, heads, width).to(dtype).transpose(1, 2)

    def make() -> dict[str, Any]:
        q, k, v = tokens(queries), tokens(keys), tokens(keys)
        return {"q": q, "k": k, "v": v, "buffer": torch.empty_like(q)}

    def ours(inputs: dict[str, Any], out: Tensor | None = None) -> Tensor:
        return attention(inputs["q"], inputs["k"], inputs["v"], width**-0.5, out=out)

    def into(inputs: dict[str, Any]) -> Tensor:
        return ours(inputs, inputs["buffer"])

    def verify() -> None:
        if reason := why_not(dtype):
            raise BackendUnavailable(reason)
        inputs = make()
        exact = formula(*(inputs[name].double() for name in "qkv"), width**-0.5)
        harness.assert_near(ours(inputs), exact, TOLERANCE[dtype], "attention")

    traffic = 2 * n * heads * (queries + keys) * width * dtype.itemsize
    candidates = {harness.OURS: ours, harness.INTO: into, "eager": expression}
    label = f"{model} {'x'.join(map(str, shape))}"
    return harness.Case(label, dtype, make, candidates, traffic, verify, expression)


def cases(device: str = "cpu") -> Iterator[harness.Case]:
    """Every case, made when its turn comes; the kernel is one of the CPU alone."""
    for (model, shape), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        yield case(model, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "shape"), SHAPES)
def test_attention(timed: Timed, model: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    timed.case(case(model, shape, dtype))


main = functools.partial(harness.run, TITLE, cases, COLUMNS, ("cpu",))

if __name__ == "__main__":
    main()
