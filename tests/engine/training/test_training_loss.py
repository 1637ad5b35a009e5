"""The training objectives and the moving average, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from torch import nn

from stepfuse.engine.sampling.bound.gaussians import discretised_log_likelihood
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.training.ema import EMA
from stepfuse.engine.training.loss import HybridLoss, simple_loss


def hybrid_inputs(count: int = 5) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x0 = torch.rand(count, 2, 4, 4) * 2 - 1
    noise = torch.randn_like(x0)
    t = torch.tensor([0, 1, 10, 500, 999])[:count]
    abar = Schedule.linear().alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = (abar.sqrt() * x0 + (1 - abar).sqrt() * noise).float()
    output = torch.cat([noise + 0.1 * torch.randn_like(noise), torch.randn_like(noise)], dim=1)
    return output, noise, x0, x_t, t


def test_the_bound_does_not_train_the_mean() -> None:
    output, noise, x0, x_t, t = hybrid_inputs()
    loss = HybridLoss(Schedule.linear())
    output.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(output, noise, x0, x_t, t).sum(), output)
    epsilon = output.detach()[:, :2].requires_grad_()
    (alone,) = torch.autograd.grad(simple_loss(epsilon, noise).sum(), epsilon)
    assert torch.equal(gradient[:, :2], alone)
    assert bool((gradient[:, 2:].flatten(1).abs().sum(dim=1) > 0).all())


def test_the_bound_is_the_kl_divergence_of_the_posteriors() -> None:
    """Against torch.distributions in float64, with the tables written out again."""
    output, _, x0, x_t, t = hybrid_inputs()
    schedule = Schedule.linear()
    got = HybridLoss(schedule).bound(output[:, :2], output[:, 2:], x0, x_t, t)
    for n in range(1, len(t)):
        i = int(t[n])
        beta = float(schedule.betas[i])
        abar, before = float(schedule.alphas_cumprod[i]), float(schedule.alphas_cumprod[i - 1])
        variance = (1 - before) / (1 - abar) * beta

        c_x0 = math.sqrt(before) * beta / (1 - abar)
        noisy = math.sqrt(1 - beta) * (1 - before) / (1 - abar) * x_t[n].double()
        fraction = (output[n, 2:].double() + 1) / 2
        std = (0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(variance))).exp()
        clean = (x_t[n].double() - math.sqrt(1 - abar) * output[n, :2].double()) / math.sqrt(abar)
        divergence = torch.distributions.kl_divergence(
            torch.distributions.Normal(c_x0 * x0[n].double() + noisy, math.sqrt(variance)),
            torch.distributions.Normal(c_x0 * clean + noisy, std),
        )
        # Differences of means of float32 inputs, over standard deviations of a hundredth.
        assert float(got[n]) == pytest.approx(float(divergence.mean()) / math.log(2), rel=2e-3)


def test_hybrid_is_simple_plus_lambda_times_the_sum_of_the_terms() -> None:
    output, noise, x0, x_t, t = hybrid_inputs()
    loss = HybridLoss(Schedule.linear())
    bound = loss.bound(output[:, :2], output[:, 2:], x0, x_t, t)
    expected = simple_loss(output[:, :2], noise) + 1e-3 * 1000 * bound
    torch.testing.assert_close(loss(output, noise, x0, x_t, t), expected)


def test_the_decoder_integrates_the_gaussian_over_each_pixel() -> None:
    values = torch.tensor([0.0, 51.0, 254.0, 255.0]) / 127.5 - 1
    mean, std = torch.tensor(0.1), torch.tensor(0.4)
    got = discretised_log_likelihood(values, mean, std)
    for n, value in enumerate(values.tolist()):
        upper = 1.0 if n == 3 else norm.cdf(value + 1 / 255, 0.1, 0.4)
        lower = 0.0 if n == 0 else norm.cdf(value - 1 / 255, 0.1, 0.4)
        assert float(got[n]) == pytest.approx(math.log(upper - lower), abs=1e-3)
    every = torch.arange(256) / 127.5 - 1
    # The bins of all 256 values cover the line once; float32 differences of a distribution.
    total = float(discretised_log_likelihood(every, mean, std).exp().sum())
    assert total == pytest.approx(1.0, abs=1e-4)


def test_ema_is_the_formula_with_warm_up() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    ema = EMA(model, decay=0.5)
    expected = 2.0
    for n in range(12):
        nn.init.constant_(model.weight, float(n * n))
        decay = min(0.5, (1 + n) / (10 + n))
        assert ema.current_decay() == decay
        ema.update(model)
        expected = decay * expected + (1 - decay) * n * n
        assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-6)
    ema.copy_to(model)
    assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-6)
    assert EMA(model).decay == 0.9999
    with pytest.raises(ValueError, match="decay is 1; accepted"):
        EMA(model, decay=1)
