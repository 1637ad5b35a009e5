"""group_norm_silu against F.silu(F.group_norm(x)), eager and compiled, and against a copy.

    python -m stepfuse.bench.bench_group_norm_silu [--json FILE] [--match TEXT] [--device cuda]

The shapes are the GroupNorm inputs of DDPM's CIFAR-10 network, ADM's 64x64 network and Stable
Diffusion 1.5 at 64x64 latents; both layouts, float32 and bfloat16.
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
from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.reference.group_norm_silu import formula

TITLE = "group_norm_silu: y = silu(GroupNorm(x))"
SHAPES = [
    ("DDPM-CIFAR", (16, 128, 32, 32)),
    ("DDPM-CIFAR", (16, 256, 16, 16)),
    ("ADM-64", (4, 192, 64, 64)),
    ("ADM-64", (4, 384, 32, 32)),
    ("SD-1.5", (2, 320, 64, 64)),
    ("SD-1.5", (2, 640, 32, 32)),
    ("SD-1.5", (2, 1280, 16, 16)),
]
LAYOUTS = {"": torch.contiguous_format, "channels-last": torch.channels_last}
TOLERANCE = 2e-5  # float32 statistics and an approximated exp, on values up to 6
COLUMNS = {"eager": "vs eager", "compile": "vs compile"}


def expression(inputs: dict[str, Any]) -> Tensor:
    """What a model without us runs."""
    return F.silu(F.group_norm(inputs["x"], 32, inputs["weight"], inputs["bias"]))


def case(
    model: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu"
) -> harness.Case:
    """One shape, dtype and layout."""
    # bfloat16 models keep their parameters in bfloat16: the same dtype for everything
    weight, bias = torch.randn(2, shape[1], device=device).to(dtype)

    def make() -> dict[str, Any]:
        x = torch.randn(shape, device=device).to(dtype).to(memory_format=LAYOUTS[layout])
        return {"x": x, "weight": weight, "bias": bias, "buffer": torch.empty_like(x)}

    def ours(inputs: dict[str, Any], out: Tensor | None = None) -> Tensor:
        return group_norm_silu(inputs["x"], inputs["weight"], inputs["bias"], 32, out=out)

    def into(inputs: dict[str, Any]) -> Tensor:
        return ours(inputs, inputs["buffer"])

    def verify() -> None:
        inputs = make()
        wide = [inputs[name].double() for name in ("x", "weight", "bias")]
        exact = formula(*wide, 32, 1e-5, None, None, None, True)
        scale = float(weight.abs().max())
        harness.assert_close(ours(inputs), exact, TOLERANCE * scale, "group_norm_silu")

    size = "x".join(map(str, shape))
    traffic = 2 * torch.Size(shape).numel() * dtype.itemsize
    candidates = {harness.OURS: ours, harness.INTO: into, "eager": expression}
    return harness.Case(
        f"{model} {size}", dtype, make, candidates, traffic, verify, expression, layout, device
    )


def cases(device: str = "cpu") -> Iterator[harness.Case]:
    """Every case, made when its turn comes."""
    for (model, shape), dtype, layout in itertools.product(
        SHAPES, (torch.float32, torch.bfloat16), LAYOUTS
    ):
        yield case(model, shape, dtype, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "shape"), SHAPES)
def test_group_norm_silu(
    timed: Timed, model: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    timed.case(case(model, shape, dtype, layout))


main = functools.partial(harness.run, TITLE, cases, COLUMNS)

if __name__ == "__main__":
    main()
