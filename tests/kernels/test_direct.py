"""What takes an operator's place in a straight line of calls, ours and others'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import needs_module
from torch import Tensor

from stepfuse.kernels import add_noise, attention, concatenate, convolve, group_norm_silu
from stepfuse.kernels.direct import blank, directly
from stepfuse.kernels.filters import filters
from stepfuse.kernels.registration import OPERATORS


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def calls() -> dict[Any, tuple[Any, ...]]:
    """Arguments for every operator that has something in its place."""
    x, heads = image(2, 32, 4, 6), torch.randn(2, 3, 5, 8)
    u = filters(torch.randn(64, 32, 3, 3), "lines", x.dtype)
    written = convolve.ConvolveCall(x, u, form="lines", groups=4, weight=torch.randn(32))
    norm = group_norm_silu.GroupNormCall(x, torch.randn(32), None, 4)
    return {
        attention.OP: (heads, heads + 1, heads - 1, 0.3),
        concatenate.OP: ([x, image(2, 5, 4, 6)],),
        convolve.OP: written.arguments(),
        group_norm_silu.OP: norm.arguments(),
    }


@needs_module
def test_every_operator_that_is_called_otherwise_gives_the_same() -> None:
    given = calls()
    assert set(given) == {target for target, known in OPERATORS.items() if known.direct}
    for target, arguments in given.items():
        call, expected = directly(target), target(*arguments)
        assert call is not target
        for _ in range(2):
            assert torch.equal(call(*arguments), expected), target


@needs_module
def test_results_go_where_they_are_told() -> None:
    given = calls()
    told = {target for target, known in OPERATORS.items() if known.blank}
    assert told == {attention.OP, concatenate.OP, convolve.OP}
    for target in told:
        expected = target(*given[target])
        like = blank(target, expected)
        assert like is not None
        assert (like.device.type, like.dtype) == ("meta", expected.dtype)
        assert (like.shape, like.stride()) == (expected.shape, expected.stride())
        place = torch.full_like(like, torch.nan, device="cpu")
        assert directly(target)(*given[target], out=place) is place
        assert torch.equal(place, expected)


def test_each_place_of_a_convolution_prepares_its_own() -> None:
    assert directly(convolve.OP) is not directly(convolve.OP)


@pytest.mark.parametrize("target", [torch.ops.aten.add.Tensor, add_noise._OP])
def test_other_operators_lose_a_frame_of_python(target: Any) -> None:
    assert directly(target) is target._op
    assert blank(target, torch.ones(2)) is None


def test_what_is_no_operator_is_called_itself() -> None:
    assert directly(filters) is filters
    assert blank(filters, (torch.ones(2),)) is None
