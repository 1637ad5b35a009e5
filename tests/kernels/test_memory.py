"""Tensors whose memory does not hold their values: negated views, and implied zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import MODES, everywhere
from torch import Tensor

from stepfuse.kernels import philox
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.group_norm_silu import group_norm_silu

SHAPE = (2, 4, 3, 5)
ABAR = torch.linspace(1, 0.1, 10, dtype=torch.float64)
ROW = torch.linspace(0.1, 1.6, 16).expand(2, 16).contiguous()


def negated(x: Tensor) -> Tensor:
    """The values of x, as a view whose memory holds -x."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    assert torch.equal(view, x)
    return view


def both(op: Any, backend: str, **arguments: Any) -> None:
    """Negated views in place of every tensor, alone and together, give what their values give."""
    expected = op(**arguments, backend=backend)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for names in (*([name] for name in tensors), tensors):
        views = {name: negated(arguments[name]) for name in names}
        for found in (
            op(**{**arguments, **views}, backend=backend),
            op(**{**arguments, **views}, backend=backend, out=torch.empty(SHAPE)),
        ):
            assert torch.equal(found, expected), names
            assert not found.is_neg()


@everywhere(MODES)
def test_add_noise(backend: str) -> None:
    t = torch.tensor([2, 7])
    given = {"x0": torch.randn(SHAPE), "t": t, "alphas_cumprod": ABAR}
    both(add_noise, backend, **given, noise=torch.randn(SHAPE))
    both(add_noise, backend, **given, noise=None, seed=t, sample=torch.tensor([5, 6]))


@everywhere(MODES)
def test_denoise_step(backend: str) -> None:
    x, output, uncond, noise = torch.randn(4, *SHAPE)
    given = {"x": x, "model_output": output, "table": ROW, "step": torch.tensor([1])}
    both(denoise_step, backend, **given, uncond_output=uncond, noise=noise)
    index = torch.tensor([5, 6])
    both(denoise_step, backend, **given, seed=index, sample=index)


@everywhere(MODES)
def test_group_norm_silu(backend: str) -> None:
    weight, bias, modulation = torch.randn(4), torch.randn(4), torch.randn(3, 2, 4)
    scale, shift, add = modulation
    both(
        group_norm_silu, backend, x=torch.randn(SHAPE), weight=weight, bias=bias, groups=2,
        scale=scale, shift=shift, add=add,
    )  # fmt: skip


@everywhere(MODES)
def test_philox(backend: str) -> None:
    index = torch.tensor([5, 6])
    expected = philox.normal(index, index, index, (7,), backend)
    seed, sample, step = (negated(index) for _ in range(3))
    assert torch.equal(philox.normal(seed, sample, step, (7,), backend), expected)
    out = torch.empty(2, 7)
    assert torch.equal(philox.normal(seed, sample, step, (7,), backend, out=out), expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_philox_integers(backend: str) -> None:
    index = torch.tensor([5, 6])
    words = philox.integers(index, index, index, (7,), backend)
    assert torch.equal(philox.integers(*[negated(index)] * 3, (7,), backend), words)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients(backend: str) -> None:
    x, weight, add, grad = (torch.randn(s) for s in (SHAPE, (4,), (2, 4), SHAPE))
    found = []
    for change in (lambda v: v, negated):
        leaves = [change(v).requires_grad_() for v in (x, weight, add)]
        y = group_norm_silu(leaves[0], leaves[1], None, 2, add=leaves[2], backend=backend)
        found.append(torch.autograd.grad(y, leaves, change(grad)))
    for plain, view in zip(*found, strict=True):
        assert torch.equal(plain, view)


@everywhere(MODES)
def test_implied_zeros(backend: str) -> None:
    """What forward-mode differentiation has for the gradients of constants: no memory at all."""
    x, zeros, implied = torch.randn(SHAPE), torch.zeros(SHAPE), torch._efficientzerotensor(SHAPE)
    assert implied.data_ptr() == 0
    ops: list[Any] = [
        lambda a, b, **more: add_noise(a, b, 3, ABAR, **more),
        lambda a, b, **more: denoise_step(a, b, ROW, 1, **more),
        lambda a, b, **more: group_norm_silu(a, None, None, 2, add=b[:, :, 0, 0], **more),
    ]
    for op in ops:
        for a, b in ((implied, x), (x, implied), (implied, implied)):
            plain = [zeros if v is implied else v for v in (a, b)]
            assert torch.equal(op(a, b, backend=backend), op(*plain, backend=backend))
        with pytest.raises(ValueError, match="out must have memory to write to"):
            op(x, x, out=implied, backend=backend)


def test_the_imaginary_part_of_a_conjugate() -> None:
    z = torch.randn(SHAPE, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    assert torch.equal(add_noise(x, x, 3, ABAR), add_noise(-z.imag, -z.imag, 3, ABAR))


def test_a_watched_call_resolves_them_too() -> None:
    """Through the dispatcher, where the profiler sees the operators."""
    x, noise = torch.randn(2, *SHAPE)
    expected, out = add_noise(x, noise, 3, ABAR), torch.empty(SHAPE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch.equal(add_noise(negated(x), negated(noise), 3, ABAR), expected)
        add_noise(negated(x), negated(noise), 3, ABAR, out=out)
    assert torch.equal(out, expected)
