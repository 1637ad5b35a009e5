"""The operators of compiled networks on views with a pending negation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepfuse.kernels.attend import attend, attend_eagerly
from stepfuse.kernels.concatenate import join, join_eagerly
from stepfuse.kernels.convolve import CallSite, convolve, filters, native

pytestmark = pytest.mark.skipif(native is None, reason="needs the C++ module (a C++ compiler)")


def negated(x: Tensor) -> Tensor:
    """The values of x, as a view whose memory holds -x, in the order of x."""
    return torch._neg_view(-x)


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_attention() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    views = [negated(x) for x in (q, k, v)]
    for call in (attend, attend_eagerly):
        assert torch.equal(call(*views, 0.3), attend(q, k, v, 0.3))


@torch.no_grad()
def test_concatenation() -> None:
    images = [channels_last(2, c, 3, 5) for c in (7, 1)]
    for call in (join, join_eagerly):
        assert torch.equal(call([negated(x) for x in images]), torch.cat(images, 1))


@torch.no_grad()
def test_convolution() -> None:
    x, beside, residual = (channels_last(2, c, 4, 6) for c in (64, 32, 32))
    u = filters(torch.randn(32, 96, 3, 3), "squares", torch.float32)
    bias, weight, offset, modulation = *torch.randn(3, 96), torch.randn(3, 2, 96)
    tensors = [x, u, bias[:32], residual, weight, offset, *modulation, beside]

    def given(change: set[int]) -> list[object]:
        x, u, bias, residual, *norm, beside = (
            negated(v) if i in change else v for i, v in enumerate(tensors)
        )
        return [x, u, bias, residual, "squares", 1, 4, 1e-3, *norm, True, beside]

    expected = convolve(*given(set()))
    for change in (*({i} for i in range(len(tensors))), set(range(len(tensors)))):
        site = CallSite()
        for call in (convolve, site, site):
            assert torch.equal(call(*given(change)), expected), change
