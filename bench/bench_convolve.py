"""convolve against F.conv2d(F.silu(F.group_norm(x))), eager and compiled, and against a copy.

    python -m stepfuse.bench.bench_convolve [--json FILE] [--match TEXT] [--no-compile]

Layers of DDPM's CIFAR-10 network, ADM's 64x64 network and Stable Diffusion 1.5, channels-last, with
the norm before them: in every form a 3x3 or 1x1 convolution can have, with filters packed
beforehand, as a compiled network has them.
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
from stepfuse.kernels.backends import BackendUnavailable
from stepfuse.kernels.convolve import CallSite, ConvolveCall
from stepfuse.kernels.filters import FORMS, Form, filters, result_shape
from stepfuse.kernels.products import why_not
from stepfuse.kernels.reference.convolve import formula

TITLE = "convolve: y = conv(silu(GroupNorm(x)), w) + b"
SHAPES = [  # with as many channels of the result
    ("DDPM-CIFAR", (8, 128, 32, 32)),
    ("ADM-64", (2, 384, 32, 32)),
    ("SD-1.5", (2, 640, 32, 32)),
]
GROUPS, EPS = 32, 1e-5
# relative L2: float32 sums of up to 5760 terms in another order; bfloat16 rounds weights, pixels
# and what it transforms of them to 8 bits
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
COLUMNS = {"eager": "vs eager", "compile": "vs compile"}


def case(model: str, shape: tuple[int, ...], dtype: torch.dtype, form: Form) -> harness.Case:
    """One shape, dtype and form."""
    channels = shape[1]
    kernel = 1 if form == "dense" else 3
    weight = torch.randn(channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    # bfloat16 models keep their parameters in bfloat16; the layer is the one with rounded weights
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    bias, scale, offset = torch.randn(3, channels).to(dtype)
    site = CallSite()

    @functools.cache
    def arguments() -> tuple[Any, ...]:
        if reason := why_not(dtype):
            raise BackendUnavailable(reason)
        norm = {"groups": GROUPS, "eps": EPS, "weight": scale, "offset": offset, "silu": True}
        # as `Prepared` keeps it: a copy in another dtype would be made for every call
        call = ConvolveCall(None, filters(weight, form, dtype), bias.float(), form=form, **norm)
        return call.arguments()[1:]

    def make() -> dict[str, Any]:
        x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        y = torch.empty(result_shape(shape, channels, form, 1), dtype=dtype)
        return {"x": x, "buffer": y.contiguous(memory_format=torch.channels_last)}

    def ours(inputs: dict[str, Any], out: Tensor | None = None) -> Tensor:
        return site(inputs["x"], *arguments(), out=out)

    def into(inputs: dict[str, Any]) -> Tensor:
        return ours(inputs, inputs["buffer"])

    def expression(inputs: dict[str, Any]) -> Tensor:
        h = F.silu(F.group_norm(inputs["x"], GROUPS, scale, offset, EPS))
        if form == "enlarged":
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return F.conv2d(h, weight, bias, padding=kernel // 2)

    def verify() -> None:
        inputs = make()
        found = ours(inputs)
        norm = (GROUPS, EPS, scale.double(), offset.double(), None, None, None, True)
        wide = (inputs["x"].double(), weight.double(), bias.double())
        exact = formula(*wide, None, form, 1, *norm)
        harness.assert_near(found, exact, TOLERANCE[dtype], f"convolve in form {form!r}")

    size, written = torch.Size(shape).numel(), result_shape(shape, channels, form, 1)
    traffic = (size + torch.Size(written).numel() + weight.numel()) * dtype.itemsize
    candidates = {harness.OURS: ours, harness.INTO: into, "eager": expression}
    label = f"{model} {'x'.join(map(str, shape))}"
    return harness.Case(label, dtype, make, candidates, traffic, verify, expression, form)


def cases(device: str = "cpu") -> Iterator[harness.Case]:
    """Every case, made when its turn comes; the kernel is one of the CPU alone."""
    for (model, shape), dtype, form in itertools.product(
        SHAPES, (torch.float32, torch.bfloat16), FORMS
    ):
        yield case(model, shape, dtype, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "shape"), SHAPES)
def test_convolve(
    timed: Timed, model: str, shape: tuple[int, ...], dtype: torch.dtype, form: Form
) -> None:
    timed.case(case(model, shape, dtype, form))


main = functools.partial(harness.run, TITLE, cases, COLUMNS, ("cpu",))

if __name__ == "__main__":
    main()
