"""The variational bound where it is known: Gaussian data under their optimal model.

A term of such a chain is quadratic in x0 and in the noise, so that its expectation is a sum over
a few values of both with weights that have the right moments. The decoder's term is none, and is
integrated over all 256 levels and the noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tests.engine.sampling.analytic import Gaussian
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.sampling.bound.chain import Chain
from stepfuse.engine.sampling.bound.gaussians import Cdf, discretised_log_likelihood
from stepfuse.engine.sampling.update import Update, VarianceType

LINEAR = sf.Schedule.linear()
FIFTY = sf.spaced_timesteps(1000, 50)
NODES = 40  # of the decoder's integral over the noise


def weighted_levels(mean: float, std: float) -> tuple[Tensor, Tensor]:
    """Three levels of a pixel, float64, with weights whose mean and variance are those given."""
    near = [round((x + 1) * 127.5) / 127.5 - 1 for x in (mean - std, mean, mean + std)]
    levels = torch.tensor(near, dtype=torch.float64)
    powers = torch.stack([levels**0, levels, levels**2])
    moments = torch.tensor([1, mean, mean**2 + std**2], dtype=torch.float64)
    return levels, torch.linalg.solve(powers, moments)


def expected(
    model: object,
    schedule: sf.Schedule,
    variance_type: VarianceType,
    timesteps: list[int] | None = None,
    mean: float = 0.0,
    std: float = 0.25,
) -> sf.Bound:
    """The expectation of all but the decoder's term, as the bound of one sample."""
    levels, weights = weighted_levels(mean, std)
    x0 = levels.repeat_interleave(2)[:, None]
    steps = len(timesteps) if timesteps else schedule.num_train_timesteps
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(3)[None, :, None]
    found = sf.bits_per_dim(
        model,  # type: ignore[arg-type]
        schedule,
        x0,
        noise=noise.expand(steps, -1, -1),
        timesteps=timesteps,
        variance_type=variance_type,
        clip_sample=None,
        batch_size=1024,
    )
    both = weights.repeat_interleave(2)[None] / 2
    return sf.Bound(
        found.timesteps,
        both @ found.prior,
        both @ found.terms,
        both @ found.x0_mse,
        both @ found.eps_mse,
    )


def decoder(model: object, schedule: sf.Schedule, last: list[int], std: float = 0.25) -> float:
    """The expectation of L_0, which depends on the last two timesteps alone."""
    z, weights = np.polynomial.hermite_e.hermegauss(NODES)
    levels = np.arange(256) / 127.5 - 1
    upper = np.where(levels > 0.999, np.inf, levels + 1 / 255)
    lower = np.where(levels < -0.999, -np.inf, levels - 1 / 255)
    mass = norm.cdf(upper / std) - norm.cdf(lower / std)
    found = sf.bits_per_dim(
        model,  # type: ignore[arg-type]
        schedule,
        torch.tensor(levels).repeat_interleave(NODES)[:, None],
        noise=torch.tensor(z).repeat(256)[None, :, None].expand(2, -1, -1),
        timesteps=last,
        clip_sample=None,
        batch_size=256 * NODES,
    )
    joint = torch.tensor(np.outer(mass, weights / weights.sum())).flatten()
    return float(joint @ found.terms[:, -1])


CHAINS = [
    # schedule, variance, timesteps, L_T, sum over i > 0, L_0, total
    (LINEAR, "fixed_small", None, 1.820110e-6, 5.279975, 2.511596, 7.791573),
    (LINEAR, "fixed_large", None, 1.820110e-6, 4.652451, 2.511596, 7.164049),
    (sf.Schedule.cosine(), "fixed_large", None, 1.094990e-10, 5.286446, 1.837543, 7.123988),
    (sf.Schedule.linear(4000), "fixed_large", None, 1.915221e-6, 5.646007, 1.445399, 7.091408),
    (sf.Schedule.linear(100), "fixed_large", None, 9.194212e-7, 3.067349, 4.075269, 7.142619),
    (LINEAR, "fixed_large", FIFTY, 2.662917e-6, 4.786485, 2.396897, 7.183385),
    (LINEAR, "fixed_small", FIFTY, 2.662917e-6, 43.049498, 2.396897, 45.446397),
]


@pytest.mark.filterwarnings("ignore:.*bits/dim over")
@pytest.mark.parametrize(
    ("schedule", "variance_type", "timesteps", "prior", "between", "last", "total"), CHAINS
)
def test_exact_chains(
    schedule: sf.Schedule,
    variance_type: VarianceType,
    timesteps: list[int] | None,
    prior: float,
    between: float,
    last: float,
    total: float,
) -> None:
    model = Gaussian(schedule, mean=0.0, std=0.25)
    found = expected(model, schedule, variance_type, timesteps)
    # figures of seven digits
    assert float(found.prior) == pytest.approx(prior, rel=1e-6)
    terms = float(found.terms[0, :-1].sum())
    assert terms == pytest.approx(between, abs=1e-6)
    end = decoder(model, schedule, (timesteps or [1, 0])[-2:])
    assert end == pytest.approx(last, abs=1e-6)
    assert float(found.prior) + terms + end == pytest.approx(total, abs=2e-6)


@dataclass
class BestVariance:
    """The optimal model with the variance of p(x_s | x_t) itself: beta~ + c_0^2 Var(x0 | x_t)."""

    gaussian: Gaussian

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        known = self.gaussian
        a, b = known.abar[t][:, None], known.before[t][:, None]
        beta = 1 - a / b
        spread = known.std**2 * (1 - a) / (a * known.std**2 + 1 - a)
        variance = (1 - b) / (1 - a) * beta + (b.sqrt() * beta / (1 - a)) ** 2 * spread
        return torch.cat([known(x, t), variance.log().expand_as(x)], dim=1)


@pytest.mark.parametrize(
    ("variance_type", "between"),
    [("fixed_small", 6.302437), ("fixed_large", 5.645641), ("learned", 5.644065)],
)
def test_other_data_and_the_best_variance(variance_type: VarianceType, between: float) -> None:
    gaussian = Gaussian(LINEAR)
    model = BestVariance(gaussian) if variance_type == "learned" else gaussian
    found = expected(model, LINEAR, variance_type, mean=0.3, std=0.5)
    assert float(found.prior) == pytest.approx(9.898789e-6, rel=1e-6)
    assert float(found.terms[0, :-1].sum()) == pytest.approx(between, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "value", "bits"),
    [
        (LINEAR, 0.0, 5.874784e-10),
        (LINEAR, 0.5, 7.278677e-6),
        (LINEAR, 1.0, 2.911295e-5),
        (sf.Schedule.cosine(), 1.0, 1.751985e-9),
    ],
)
def test_the_prior_of_a_constant_image(schedule: sf.Schedule, value: float, bits: float) -> None:
    chain = Chain.of(schedule, range(999, -1, -1), Update("ddpm", variance_type="fixed_large"))
    found = chain.prior(torch.full((2, 3, 5, 7), value))
    assert found.tolist() == pytest.approx([bits, bits], rel=1e-6)


RATES = [
    # the last timestep received, rate, rmse on 0 .. 255, Shannon's rate
    (500, 0.015229, 63.0810, 0.015219),
    (100, 0.835237, 35.7627, 0.833972),
    (20, 2.732675, 9.6014, 2.731103),
    (5, 4.244293, 3.3674, 4.242715),
    (1, 5.645651, 1.2748, 5.644073),
]


def test_the_rate_is_at_least_shannons() -> None:
    """0.5 log2(std^2 / D^2): no code of normal data has fewer bits at a distortion D."""
    found = expected(Gaussian(LINEAR), LINEAR, "fixed_large", mean=0.3, std=0.5)
    rate, rmse = found.rate_distortion()
    assert len(rate) == len(rmse) == 1001
    assert float(rmse[-1]) == 0
    shannon = torch.log2(0.5 * 127.5 / rmse[:-1])
    gap = rate[:-1] - shannon
    assert float(gap.min()) >= 0
    assert float(gap.max()) < 0.0016
    # whoever has received the term of timestep t is at the next one
    for t, bits, error, least in RATES:
        i = found.timesteps.index(t) + 1
        assert float(rate[i]) == pytest.approx(bits, abs=1e-6)
        assert float(rmse[i]) == pytest.approx(error, abs=1e-4)
        assert float(shannon[i]) == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "mean"])
def test_one_model_in_other_words(variance_type: VarianceType, prediction_type: str) -> None:
    """The bound does not depend on what the optimal model predicts."""
    schedule = sf.Schedule.linear(60)
    x0 = torch.randint(256, (3, 2, 3, 5), dtype=torch.uint8).double() / 127.5 - 1
    told = {"variance_type": variance_type, "seed": 4}
    epsilon = sf.bits_per_dim(Gaussian(schedule), schedule, x0, **told)
    other = sf.bits_per_dim(
        replace(Gaussian(schedule), prediction_type=prediction_type),
        schedule,
        x0,
        prediction_type=prediction_type,  # type: ignore[arg-type]
        **told,
    )
    torch.testing.assert_close(other.terms, epsilon.terms, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
def test_the_bins_cover_the_line_once(cdf: Cdf) -> None:
    every = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.1, 0.4), (-1.3, 0.02), (0.97, 0.01)):
        found = discretised_log_likelihood(
            every, torch.tensor(mean).double(), torch.tensor(std).double(), cdf
        )
        # of each bin that has none, 1e-12 are counted
        assert float(found.exp().sum()) == pytest.approx(1, abs=256e-12)


def test_a_bin_without_mass_costs_forty_bits() -> None:
    found = discretised_log_likelihood(
        torch.ones(1).double(), -torch.ones(1).double(), torch.tensor(0.01).double()
    )
    assert float(-found) / math.log(2) == pytest.approx(39.86, abs=0.005)
