"""Shapes, layouts, dtypes and gradients of a step, against the installed diffusers classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.adapters.schedulers_case import ODD, close, pair

SHAPES = [(1, 1), (2, 3), (5,), (), (0, 3, 4, 4), (1, 3, 2, 2, 2), (1, 1, 1, 1)]


@pytest.mark.parametrize(
    ("shape", "thresholding"),
    [*((shape, False) for shape in SHAPES), ((2, 3, 4), True), ((1, 3, 2, 2, 2), True)],
)
def test_shapes(shape: tuple[int, ...], thresholding: bool) -> None:
    theirs, ours = pair("DDIMScheduler", thresholding=thresholding)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        results.append(scheduler.step(0.3 * x + 0.1, 400, x))
    assert results[1].prev_sample.shape == shape
    close(results[1].prev_sample, results[0].prev_sample, 1.0, "x")
    close(results[1].pred_original_sample, results[0].pred_original_sample, 3.0, "x0")


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced"])
def test_layouts(layout: str) -> None:
    base = torch.randn(4, 6, 5, 7)
    x = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "permuted": base.permute(1, 0, 3, 2),
        "sliced": base[:, ::2],
    }[layout]
    output = torch.randn(x.shape)
    results = []
    for scheduler in pair("DDIMScheduler"):
        scheduler.set_timesteps(5)
        results.append(scheduler.step(output, 400, x).prev_sample)
    close(results[1], results[0], 4.0, "x")


def test_broadcast_outputs_as_in_theirs() -> None:
    x, output = torch.randn(4, 3, 5, 5), torch.randn(1, 3, 5, 5)
    results = []
    for scheduler in pair("DDIMScheduler"):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, 400, x, eta=1.0, generator=generator).prev_sample)
    close(results[1], results[0], 4.0, "x")


HALVES = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff
# theirs rounds after each of some ten operations, on values of up to 5
THEIR_ROUNDINGS = 50


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_half_precision(name: str, dtype: torch.dtype, output_dtype: torch.dtype) -> None:
    """Of their dtype; one rounding away from the exact step, where theirs is many."""
    x = torch.randn(ODD, generator=torch.Generator().manual_seed(1)).to(dtype)
    output = torch.randn(ODD, generator=torch.Generator().manual_seed(2)).to(output_dtype)
    theirs, ours = pair(name)
    kwargs = {"eta": 0.8} if name == "DDIMScheduler" else {}
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for t in (900, 500, 100, 0):
        a = theirs.step(output, t, x, generator=torch.Generator().manual_seed(5), **kwargs)
        b = ours.step(output, t, x, generator=torch.Generator().manual_seed(5), **kwargs)
        assert b.prev_sample.dtype is a.prev_sample.dtype
        assert b.pred_original_sample.dtype is a.pred_original_sample.dtype
        noise = torch.randn(ODD, generator=torch.Generator().manual_seed(5), dtype=output_dtype)
        exact = _exact_step(name, theirs, output, t, x, noise, kwargs)
        wide = b.prev_sample.dtype is torch.float32
        unit = 1e-6 if wide else HALVES[b.prev_sample.dtype]
        error = (b.prev_sample.double() - exact).abs()
        assert (error <= unit * exact.abs() + 2e-6).all()
        assert (a.prev_sample.double() - exact).abs().max() <= THEIR_ROUNDINGS * HALVES[dtype]


def _exact_step(
    name: str,
    scheduler: Any,
    output: torch.Tensor,
    t: int,
    x: torch.Tensor,
    noise: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Their step in float64 on the same numbers, with the given noise."""
    x, output, noise = x.double(), output.double(), noise.double()
    if name == "DDIMScheduler":
        return scheduler.step(output, t, x, variance_noise=noise, **kwargs).prev_sample
    result = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    if t > 0:
        drawn = torch.randn(ODD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        result = result + scheduler._get_variance(t).double().sqrt() * (noise - drawn)
    return result


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"])
def test_float64(name: str) -> None:
    results = []
    x = torch.randn(ODD, dtype=torch.float64)
    output = torch.randn(ODD, dtype=torch.float64)
    for scheduler in pair(name):
        scheduler.set_timesteps(10)
        kwargs = {} if name == "DDIMInverseScheduler" else {"generator": torch.manual_seed(3)}
        results.append(scheduler.step(output, 500, x, **kwargs))
    # their float32 coefficients, applied in float64
    for key in ("prev_sample", "pred_original_sample"):
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-6, atol=1e-6)


def test_gradients_flow_as_in_theirs() -> None:
    grads = []
    for scheduler in pair("DDIMScheduler", clip_sample=False):
        scheduler.set_timesteps(5)
        x = torch.linspace(-1, 1, 30).reshape(1, 2, 3, 5).requires_grad_()
        output = x.detach().flip(-1).requires_grad_()
        result = scheduler.step(output, 600, x)
        (result.prev_sample.square().sum() + result.pred_original_sample.sum()).backward()
        grads.append((x.grad, output.grad))
    for mine, other in zip(*grads[::-1], strict=True):
        close(mine, other, 20.0, "gradient")
