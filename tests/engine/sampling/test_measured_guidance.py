"""PiGDM and DPS: exact posteriors of Gaussian data, and their formulas step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy, Gaussian
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.sampling.guidance.measured import Measured

LINEAR = sf.Schedule.linear()
ABAR = LINEAR.alphas_cumprod
Y = 0.7
EXACT = 1e-9  # float64, amplified by 1 / sqrt(abar_T) = 158
SIX_FIGURES = 2e-6

# (m, c, s, sigma_y), then (mean, std) for S=50 eta 0 and 1, S=1000 eta 0 and 1:
# y = s x0 + sigma_y n of data N(m, c^2); weight "score" with data_std c
SCORE = {
    (0.0, 1.0, 1.0, 0.05): [
        (0.698080, 0.032580), (0.698254, 0.026500), (0.698042, 0.047901), (0.698254, 0.046230),
    ],
    (0.0, 1.0, 1.0, 0.3): [
        (0.640907, 0.262456), (0.642199, 0.240986), (0.641035, 0.285888), (0.642200, 0.283608),
    ],
    (0.0, 1.0, 0.1, 0.05): [
        (5.581913, 0.420357), (5.599934, 0.393439), (5.584143, 0.445730), (5.599955, 0.443367),
    ],
    (0.3, 0.5, 1.0, 0.3): [
        (0.593055, 0.232717), (0.594115, 0.212595), (0.593152, 0.255781), (0.594116, 0.253523),
    ],
    (0.3, 0.5, 0.5, 0.05): [
        (1.356894, 0.076491), (1.357692, 0.066755), (1.356861, 0.096369), (1.357692, 0.094369),
    ],
    (0.3, 0.5, 0.0, 0.05): [
        (0.298911, 0.472439), (0.299996, 0.444123), (0.299050, 0.498495), (0.299997, 0.496110),
    ],
}  # fmt: skip
WAYS = [(50, 0.0), (50, 1.0), (1000, 0.0), (1000, 1.0)]


def scalar(s: float) -> sf.inverse.Dense:
    return sf.inverse.Dense(torch.tensor([[s]], dtype=torch.float64))


def affine_map(sampler: sf.Sampler, y: float = Y) -> tuple[float, float]:
    """(mean, std) of x_0 over x_T ~ N(0, 1) and the noise of every step, by their linearity.

    The chain is x_0 = k + sum_j w_j z_j. Run with all z at 0 it gives k, with z_j = 1 alone w_j.
    """
    rows = len(sampler.timesteps)
    z = torch.cat([torch.zeros(1, rows + 1), torch.eye(rows + 1)]).double()[..., None]
    measured = torch.full((rows + 2, 1), y, dtype=torch.float64)
    x = sampler.sample(
        (rows + 2, 1),
        x_T=z[:, 0],
        noise=z[:, 1:].mT.swapaxes(0, 1).reshape(rows + 2, rows).T[..., None].contiguous(),
        measurement=measured,
    )
    weights = x[1:] - x[:1]
    return float(x[0]), float(weights.norm())


def chain(model: Gaussian, guidance: Measured, steps: int, eta: float, **more: Any) -> sf.Sampler:
    return sf.Sampler(
        model, LINEAR, steps=steps, eta=eta, guidance=guidance, clip_sample=None,
        dtype=torch.float64, **more,
    )  # fmt: skip


def by_hand(
    m: float,
    c: float,
    s: float,
    sigma: float,
    steps: int,
    eta: float,
    weight: str,
    std: float,
    y: float = Y,
) -> tuple[float, float]:
    """(mean, std) of the same chain, said in scalars from the papers' formulas."""
    mean, variance = 0.0, 1.0
    timesteps = sf.spaced_timesteps(1000, steps)
    for i, t in enumerate(timesteps):
        a = float(ABAR[t])
        b = float(ABAR[timesteps[i + 1]]) if i + 1 < steps else 1.0
        k = c**2 * math.sqrt(a) / (a * c**2 + 1 - a)  # x0h = k x + d
        d = (1 - a) * m / (a * c**2 + 1 - a)
        r2 = std**2 * (1 - a) / (a * std**2 + 1 - a)
        gain = s / (r2 * s * s + sigma**2) if s else 0.0  # u = gain (y - s x0h)
        g_x, g_1 = -k * gain * s * k, k * gain * (y - s * d)  # G = g_x x + g_1
        x0_x, x0_1 = k, d
        if weight == "score":
            x0_x, x0_1 = k + (1 - a) / math.sqrt(a) * g_x, d + (1 - a) / math.sqrt(a) * g_1
        drift = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        direction = math.sqrt(1 - b - drift) / math.sqrt(1 - a)
        by_x = math.sqrt(b) * x0_x + direction * (1 - math.sqrt(a) * x0_x)
        by_1 = math.sqrt(b) * x0_1 - direction * math.sqrt(a) * x0_1
        if weight == "paper":
            by_x, by_1 = by_x + math.sqrt(a * b) * r2 * g_x, by_1 + math.sqrt(a * b) * r2 * g_1
        mean, variance = by_x * mean + by_1, by_x**2 * variance + drift
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("case", SCORE)
def test_posteriors_in_scalars(case: tuple[float, float, float, float], way: int) -> None:
    """The formulas give the figures."""
    m, c, s, sigma = case
    found = by_hand(m, c, s, sigma, *WAYS[way], "score", c)
    assert found == pytest.approx(SCORE[case][way], abs=SIX_FIGURES)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("way", range(2))
@pytest.mark.parametrize("case", SCORE)
def test_the_sampler_is_that_map(
    case: tuple[float, float, float, float], way: int, prediction: str
) -> None:
    m, c, s, sigma = case
    model = Gaussian(LINEAR, prediction, m, c)
    guidance = sf.PiGDM(scalar(s), sigma, data_std=c)
    sampler = chain(model, guidance, *WAYS[way], prediction_type=prediction)
    mean, std = affine_map(sampler)
    expected = by_hand(m, c, s, sigma, *WAYS[way], "score", c)
    assert (mean, std) == pytest.approx(expected, abs=EXACT, rel=EXACT)
    assert (mean, std) == pytest.approx(SCORE[case][way], abs=SIX_FIGURES)


@pytest.mark.parametrize("way", [2, 3])
def test_a_thousand_steps(way: int) -> None:
    case = (0.3, 0.5, 1.0, 0.3)
    sampler = chain(Gaussian(LINEAR), sf.PiGDM(scalar(1.0), 0.3, data_std=0.5), *WAYS[way])
    found = affine_map(sampler)
    assert found == pytest.approx(by_hand(*case, *WAYS[way], "score", 0.5), abs=EXACT, rel=EXACT)
    assert found == pytest.approx(SCORE[case][way], abs=SIX_FIGURES)


PAPER = [
    (50, 0.0, 0.3, 0.725060, 0.002036),
    (50, 1.0, 0.3, 0.698839, 0.137343),
    (1000, 0.0, 0.3, 0.702893, 0.0),
    (1000, 1.0, 0.3, 0.7, 0.067329),
    (50, 0.0, 0.0, 0.7, 0.0),
    (50, 1.0, 0.0, 0.7, 0.0),
]


@pytest.mark.parametrize(("steps", "eta", "sigma", "mean", "std"), PAPER)
def test_the_weight_of_the_paper(
    steps: int, eta: float, sigma: float, mean: float, std: float
) -> None:
    """Which is narrower than the posterior, N(.642, .287^2), the more so the more steps."""
    expected = by_hand(0, 1, 1, sigma, steps, eta, "paper", 1.0)
    assert expected == pytest.approx((mean, std), abs=SIX_FIGURES)
    if steps > 50:
        return
    model = Gaussian(LINEAR, mean=0.0, std=1.0)
    sampler = chain(model, sf.PiGDM(scalar(1.0), sigma, weight="paper"), steps, eta)
    assert affine_map(sampler) == pytest.approx(expected, abs=EXACT, rel=EXACT)


def test_the_deviation_of_the_data_matters() -> None:
    found = by_hand(0.3, 0.5, 1, 0.3, 1000, 1.0, "score", 1.0)
    assert found == pytest.approx((0.560016, 0.265857), abs=SIX_FIGURES)


def test_the_posterior_of_a_vector() -> None:
    """White 2x2 images under a blur: a scalar chain in every singular direction.

    Mean and covariance of 20,000 samples are within four standard errors of the closed form.
    """
    a, c, sigma, count = sf.inverse.Blur(0.7), 0.8, 0.3, 20_000
    m = a(torch.eye(4, dtype=torch.float64).view(4, 1, 2, 2)).flatten(1).T
    left, values, right = torch.linalg.svd(m)
    y = torch.tensor([0.5, -0.3, 0.2, 0.9], dtype=torch.float64)
    ways = [
        by_hand(0.0, c, s, sigma, 50, 1.0, "score", c, y=float(left[:, i] @ y))
        for i, s in enumerate(values.tolist())
    ]
    means, stds = torch.tensor(ways, dtype=torch.float64).unbind(1)
    mean, covariance = right.T @ means, right.T @ stds.square().diag() @ right
    assert float(covariance[0, 1].abs()) > 0.03  # it is no matter of elements
    sampler = sf.Sampler(
        Gaussian(LINEAR, mean=0.0, std=c), LINEAR, steps=50, eta=1.0, clip_sample=None,
        guidance=sf.PiGDM(a, sigma, data_std=c), dtype=torch.float64,
    )  # fmt: skip
    measured = y.view(1, 1, 2, 2).expand(count, 1, 2, 2)
    found = sampler.sample((count, 1, 2, 2), seed=1, measurement=measured).flatten(1)
    d = covariance.diagonal()
    errors = (found.mean(0) - mean).abs() / (d / count).sqrt()
    assert float(errors.max()) < 4
    spread = ((d[:, None] * d + covariance**2) / count).sqrt()
    assert float(((found.T.cov() - covariance).abs() / spread).max()) < 4
    # fifty steps are narrower than the posterior, as in the table; many come to it
    exact = torch.linalg.inv(m.T @ m / sigma**2 + torch.eye(4).double() / c**2)
    ways = [
        by_hand(0.0, c, s, sigma, 1000, 1.0, "score", c, y=float(left[:, i] @ y))
        for i, s in enumerate(values.tolist())
    ]
    means, stds = torch.tensor(ways, dtype=torch.float64).unbind(1)
    near = right.T @ stds.square().diag() @ right
    torch.testing.assert_close(near, exact, rtol=0.04, atol=0.004)
    torch.testing.assert_close(right.T @ means, exact @ m.T @ y / sigma**2, rtol=0.01, atol=0.01)


SHAPE = (2, 1, 4, 4)


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(x: Tensor, t: int, clip: float | None, loss: Any) -> Tensor:
    """Of a loss of x0h with respect to x, by autograd through everything."""
    a = ABAR[t]
    leaf = x.clone().requires_grad_(True)
    x0 = (leaf - (1 - a).sqrt() * Bumpy()(leaf, torch.full((len(x),), t))) / a.sqrt()
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    return torch.autograd.grad(loss(x0), leaf)[0]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_dps_step_by_step(method: str, clip: float | None) -> None:
    """x_s -= scale grad |y - A x0h|, per sample, after the plain update."""
    a, scale = sf.inverse.Downsample(2), 0.6
    settings: dict[str, Any] = {
        "steps": 5, "method": method, "clip_sample": clip, "dtype": torch.float64,
    }  # fmt: skip
    plain = sf.Sampler(Bumpy(), LINEAR, **settings)
    guided = sf.Sampler(Bumpy(), LINEAR, guidance=sf.DPS(a, scale), **settings)
    y, x, noise = image(1, (2, 1, 2, 2)), image(2), torch.zeros(5, *SHAPE, dtype=torch.float64)
    steps = list(guided.iterate(SHAPE, x_T=x, noise=noise, measurement=y))
    for i, step in enumerate(steps):
        left = next(plain.iterate(SHAPE, x_T=x, noise=noise, start=step.t))

        def loss(x0: Tensor) -> Tensor:
            return (y - a(x0)).flatten(1).norm(dim=1).sum()

        expected = left.x - scale * gradient(x, step.t, clip, loss)
        torch.testing.assert_close(step.x, expected, rtol=1e-9, atol=1e-9)
        x = step.x
        assert i == step.index


@pytest.mark.parametrize("clip", [None, 1.0])
def test_pigdm_step_by_step(clip: float | None) -> None:
    """eps - sqrt(1-a) J^T u, with u held while the gradient is taken."""
    a, sigma, c = sf.inverse.Blur(0.8), 0.2, 0.7
    guided = sf.Sampler(
        Bumpy(), LINEAR, steps=5, clip_sample=clip, dtype=torch.float64,
        guidance=sf.PiGDM(a, sigma, data_std=c),
    )  # fmt: skip
    y, x = image(1), image(2)
    ends = [*guided.timesteps[1:], None]
    for step, s in zip(guided.iterate(SHAPE, x_T=x, measurement=y), ends, strict=True):
        abar = ABAR[step.t]
        b = ABAR[s] if s is not None else torch.ones((), dtype=torch.float64)
        r2 = float(c**2 * (1 - abar) / (abar * c**2 + 1 - abar))

        def loss(x0: Tensor, r2: float = r2) -> Tensor:
            u = a.adjoint(a.solve(y - a(x0.detach()), r2, sigma))
            return (u * x0).sum()

        g = gradient(x, step.t, clip, loss)
        eps = Bumpy()(x, torch.full((2,), step.t)) - (1 - abar).sqrt() * g
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        x = b.sqrt() * x0 + (1 - b).sqrt() * eps
        torch.testing.assert_close(step.x, x, rtol=1e-9, atol=1e-9)
        x = step.x


def conditioned(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    out = Bumpy()(x, t)
    return out if label is None else out * (1 + label.view(-1, 1, 1, 1) / 10)


@pytest.mark.parametrize("batched", [False, True])
def test_with_classifier_free_guidance(batched: bool) -> None:
    """The same as PiGDM of a model that is the mixture."""
    label, scale = torch.tensor([1.0, 3.0]), 2.5

    def mixture(x: Tensor, t: Tensor) -> Tensor:
        other = conditioned(x, t, torch.zeros(2))
        return other + scale * (conditioned(x, t, label) - other)

    a, y = sf.inverse.Downsample(2), image(1, (2, 1, 2, 2))
    settings: dict[str, Any] = {"steps": 4, "dtype": torch.float64, "eta": 1.0}
    cfg = sf.CFG(scale, {"label": torch.zeros(1)}, batched=batched)
    both = sf.Sampler(conditioned, LINEAR, guidance=sf.PiGDM(a, 0.1, cfg=cfg), **settings)
    one = sf.Sampler(mixture, LINEAR, guidance=sf.PiGDM(a, 0.1), **settings)
    assert (both.num_function_evaluations, one.num_function_evaluations) == (8, 4)
    torch.testing.assert_close(
        both.sample(SHAPE, measurement=y, condition={"label": label}),
        one.sample(SHAPE, measurement=y),
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip
