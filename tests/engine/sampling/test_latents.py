"""Walking between latents and between images."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import geometric_slerp
from tests.engine.sampling.analytic import Bumpy, Gaussian
from torch import Tensor

from stepfuse import Sampler, Schedule, interpolate, slerp
from stepfuse.kernels import philox

LINEAR = Schedule.linear()
SHAPE = (2, 3, 4, 4)
EXACT = 1e-12  # float64, a handful of operations on numbers around 1


def unit(seed: int, size: int = 24) -> Tensor:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm()


@pytest.mark.parametrize("size", [2, 3, 24])
def test_slerp_equals_scipy_on_the_unit_sphere(size: int) -> None:
    a, b = unit(1, size), unit(2, size)
    weights = [0.0, 0.1, 0.5, 0.77, 1.0]
    for weight, expected in zip(weights, geometric_slerp(a, b, weights), strict=True):
        ours = slerp(a.view(1, -1), b.view(1, -1), weight)
        assert ours.shape == (1, size)
        torch.testing.assert_close(ours[0], torch.from_numpy(expected), rtol=0, atol=EXACT)


def test_slerp_in_the_plane() -> None:
    """Angles add up, and lengths are mixed like the directions."""
    for degrees in (1.0, 45.0, 90.0, 135.0, 179.0):
        theta = math.radians(degrees)
        a = torch.tensor([1.0, 0.0], dtype=torch.float64)
        b = 3 * torch.tensor([math.cos(theta), math.sin(theta)], dtype=torch.float64)
        for weight in (0.25, 0.5, 0.9):
            of_a = math.sin((1 - weight) * theta) / math.sin(theta)
            of_b = 3 * math.sin(weight * theta) / math.sin(theta)
            expected = [of_a + of_b * math.cos(theta), of_b * math.sin(theta)]
            assert slerp(a, b, weight).tolist() == pytest.approx(
                expected, abs=1e-10
            )  # acos near 180 degrees
            arc = slerp(a, b / 3, weight)
            assert float(torch.atan2(arc[1], arc[0])) == pytest.approx(weight * theta, abs=1e-12)


def test_slerp_keeps_the_length_between_orthogonal_latents() -> None:
    a = torch.zeros(SHAPE, dtype=torch.float64)
    b = torch.zeros(SHAPE, dtype=torch.float64)
    a[0], b[1] = 2.0, 2.0
    for weight in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert float(slerp(a, b, weight).norm()) == pytest.approx(float(a.norm()), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slerp_ends_where_it_says(dtype: torch.dtype) -> None:
    a, b = unit(1).to(dtype), (5 * unit(2)).to(dtype)
    for weight, end in ((0.0, a), (1.0, b), (torch.tensor(0.0), a), (torch.tensor(1.0), b)):
        ours = slerp(a, b, weight)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, end, rtol=0, atol=1e-15)


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=8),
    weight=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_slerp_is_symmetric_and_finite(values: list[float], weight: float) -> None:
    a, b = torch.tensor(values, dtype=torch.float64).view(2, 4)
    there, back = slerp(a, b, weight), slerp(b, a, 1 - weight)
    scale = float(a.norm() + b.norm())
    assert bool(torch.isfinite(there).all())
    # near antiparallel ends the angle is known to 1e-16 / 1e-6, where the straight line takes over
    torch.testing.assert_close(there, back, rtol=0, atol=1e-8 * scale + 1e-300)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_slerp_of_parallel_and_zero_latents_is_the_straight_line(
    dtype: torch.dtype, weight: float
) -> None:
    a = unit(3).to(dtype)
    zero = torch.zeros_like(a)
    near = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    for u, v in ((a, a), (a, 2 * a), (a, -a), (a, zero), (zero, a), (zero, zero)):
        expected = (1 - weight) * u.double() + weight * v.double()
        torch.testing.assert_close(slerp(u, v, weight).double(), expected, rtol=0, atol=near)
    nudged = a * (1 + 4 * torch.finfo(dtype).eps)
    assert bool(torch.isfinite(slerp(a, nudged, weight)).all())


def test_slerp_needs_one_shape() -> None:
    with pytest.raises(ValueError, match=r"one shape; got \(2, 3\) and \(3, 2\)"):
        slerp(torch.zeros(2, 3), torch.zeros(3, 2), 0.5)


# --- images


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    a, b = torch.rand(2, *SHAPE, generator=generator) * 2 - 1
    return a, b


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_interpolation_is_noise_mix_and_sample(eta: float) -> None:
    sampler = Sampler(Bumpy(), LINEAR, steps=8, eta=eta, graph=None)
    a, b = images()
    t = 500
    abar = LINEAR.alphas_cumprod[t].float()
    noise = philox.normal(3, torch.arange(4), philox.INITIAL, SHAPE[1:])
    pairs = zip((a, b), noise.split(2), strict=True)
    ends = [abar.sqrt() * x + (1 - abar).sqrt() * z for x, z in pairs]
    for weight in (0.0, 0.25, 1.0):
        mixed = (1 - weight) * ends[0] + weight * ends[1]
        expected = sampler.sample(SHAPE, seed=3, x_T=mixed, start=t)
        ours = interpolate(sampler, a, b, weight, t, seed=3)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_interpolation_starts_at_the_timestep_below() -> None:
    sampler = Sampler(Bumpy(), LINEAR, steps=8, graph=None)  # 875, 750, .. 0
    a, b = images()
    exact = interpolate(sampler, a, b, 0.5, 500)
    assert torch.equal(interpolate(sampler, a, b, 0.5, 600), exact)
    assert torch.equal(interpolate(sampler, a, b, 0.5, 999), interpolate(sampler, a, b, 0.5, 875))
    assert not torch.equal(interpolate(sampler, a, b, 0.5, 750), exact)


def test_ends_of_an_interpolation_know_nothing_of_the_other_image() -> None:
    sampler = Sampler(Bumpy(), LINEAR, steps=8, eta=1.0, graph=None)
    a, b = images()
    assert torch.equal(interpolate(sampler, a, b, 0.0, 750), interpolate(sampler, a, -b, 0.0, 750))
    assert torch.equal(interpolate(sampler, a, b, 1.0, 750), interpolate(sampler, -a, b, 1.0, 750))


def test_little_noise_gives_the_images_back() -> None:
    """From t = 20 an optimal denoiser for data of any width returns what went in."""
    sampler = Sampler(
        Gaussian(LINEAR, mean=0.0, std=10.0), LINEAR, timesteps=[20, 10, 0], graph=None
    )
    a, b = images()
    sigma = float((1 - LINEAR.alphas_cumprod[20]).sqrt())
    for weight, image in ((0.0, a), (1.0, b)):
        error = interpolate(sampler, a, b, weight, 20) - image
        assert float(error.std()) < 1.5 * sigma < 0.15
        assert 0.5 * sigma < float(error.std())


def test_interpolations_that_are_refused() -> None:
    sampler = Sampler(Bumpy(), LINEAR, timesteps=[500, 100], graph=None)
    a, b = images()
    with pytest.raises(ValueError, match=r"one shape; got \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        interpolate(sampler, a, b[:1], 0.5, 500)
    with pytest.raises(ValueError, match="t must be at least 100; got 99"):
        interpolate(sampler, a, b, 0.5, 99)
