"""How a bound is computed: against guided-diffusion's loop, in any batches, captured or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import denoising_diffusion_pytorch.learned_gaussian_diffusion as lucidrains
import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.bench.guided_bound import calc_bpd_loop
from stepfuse.engine.sampling.bound import bounding
from stepfuse.engine.sampling.bound.bounding import Bounding
from stepfuse.engine.sampling.bound.chain import Chain
from stepfuse.engine.sampling.bound.gaussians import discretised_log_likelihood, normal_divergence
from stepfuse.engine.sampling.bound.walk import Walk
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.points import level_at
from stepfuse.engine.sampling.request import Request
from stepfuse.engine.sampling.update import Update, VarianceType
from stepfuse.kernels import philox

SCHEDULE = sf.Schedule.linear(60)
SPACED = sf.spaced_timesteps(60, 7)
VARIANCES: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "learned", "learned_range")
SHAPES = [(3, 3, 5, 7), (1, 1, 1, 1), (2, 6), (4, 2, 9)]
quiet = pytest.mark.filterwarnings("ignore:.*bits/dim over")


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """8-bit images, both ends among their levels."""
    levels = torch.randint(256, shape)
    levels.view(-1)[:2] = torch.tensor([0, 255])[: levels.numel()]
    return (levels.double() / 127.5 - 1).to(dtype)


@quiet
@pytest.mark.parametrize("timesteps", [None, SPACED])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_guided_diffusions_loop(
    shape: tuple[int, ...], variance_type: VarianceType, clip: bool, timesteps: list[int] | None
) -> None:
    """In float64, over a chain of any spacing: what differs is the order of sums."""
    model, x0 = Bumpy(variance_type), images(*shape, dtype=torch.float64)
    steps = list(range(59, -1, -1)) if timesteps is None else timesteps
    noise = torch.randn(len(steps), *shape, dtype=torch.float64)
    found = sf.bits_per_dim(
        model,
        SCHEDULE,
        x0,
        timesteps=timesteps,
        variance_type=variance_type,
        clip_sample=1.0 if clip else None,
        noise=noise,
        cdf="tanh",
        batch_size=5,
    )
    theirs = calc_bpd_loop(
        model, SCHEDULE.alphas_cumprod, steps, x0, list(noise), variance_type, clip
    )
    assert found.timesteps == tuple(steps)
    for mine, other in (
        (found.prior, theirs.prior),
        (found.terms, theirs.bits),
        (found.x0_mse, theirs.x0_mse),
        (found.eps_mse, theirs.eps_mse),
        (found.total, theirs.prior + theirs.bits.sum(1)),
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@quiet
@pytest.mark.parametrize("variance_type", VARIANCES)
def test_float32_is_float64_to_rounding(variance_type: VarianceType) -> None:
    """x_t is rounded by 6e-8, beside a noise of 0.01 at the least, and so is the output."""
    x0, noise = images(4, 3, 6, 5, dtype=torch.float64), torch.randn(60, 4, 3, 6, 5)
    told = {"variance_type": variance_type, "noise": noise}
    exact = sf.bits_per_dim(Bumpy(variance_type), SCHEDULE, x0, **told)
    found = sf.bits_per_dim(Bumpy(variance_type), SCHEDULE, x0.float(), **told)
    torch.testing.assert_close(found.terms, exact.terms, rtol=2e-5, atol=2e-6)
    assert found.terms.dtype is torch.float64


@quiet
@pytest.mark.parametrize("graph", [None, "step", "auto"])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, 1000])
def test_a_sample_does_not_know_its_batch(
    batch_size: int, graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: whatever size the batches have, captured or not, and the last one filled up."""
    x0 = images(5, 3, 5, 7)
    told: dict[str, Any] = {"seed": 3, "timesteps": SPACED, "variance_type": "learned_range"}
    whole = sf.bits_per_dim(Bumpy("learned_range"), SCHEDULE, x0, graph=None, **told)

    def poisoned(count: int, **options: Any) -> Tensor:
        return torch.full((count,), torch.nan, **options)

    monkeypatch.setattr(bounding, "empty", poisoned)
    found = sf.bits_per_dim(
        Bumpy("learned_range"), SCHEDULE, x0, graph=graph, batch_size=batch_size, **told
    )
    assert torch.equal(found.terms, whole.terms)
    assert torch.equal(found.x0_mse, whole.x0_mse)
    alone = sf.bits_per_dim(Bumpy("learned_range"), SCHEDULE, x0[3:4], first_index=3, **told)
    assert torch.equal(alone.terms, whole.terms[3:4])
    assert torch.equal(alone.prior, whole.prior[3:4])


def test_the_noise_is_that_of_the_sampler() -> None:
    """x_t = sqrt(a) x0 + sqrt(1 - a) eps with eps of (seed, sample, t)."""
    x0, seen = images(2, 1, 4, 4), {}

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.update({int(t[n]): x[n].clone() for n in (0,)})
        return x

    sf.bits_per_dim(model, SCHEDULE, x0[:1], seed=9, first_index=5, batch_size=1)
    for t in (59, 30, 0):
        eps = philox.normal(9, 5, t, (1, 4, 4))
        a = float(SCHEDULE.alphas_cumprod[t])
        torch.testing.assert_close(seen[t], a**0.5 * x0[0] + (1 - a) ** 0.5 * eps)


def walk(model: Callable[..., Tensor], x0: Tensor, **options: Any) -> Walk:
    steps = tuple(SPACED)
    chain = Chain.of(SCHEDULE, steps, Update("ddpm", variance_type="fixed_large"))
    abar = SCHEDULE.alphas_cumprod
    level = partial(level_at, SCHEDULE, prediction_type="epsilon")
    last = SCHEDULE.num_train_timesteps - 1
    request = Request(steps, len(steps), last, level, x0.device, x0.dtype, "cpp", None, x0.shape)
    settings = {"batch_size": 4, "cdf": "exact", "backend": "cpp", "graph": "step", **options}
    return Walk(Denoiser(model), chain, abar, request, x0, **settings)


def test_one_capture_serves_every_batch() -> None:
    """35 pairs in batches of 4: nine steps of one capture."""
    going = walk(Bumpy(), images(5, 1, 4, 4))
    cuts: list[slice] = []
    going.run(lambda cut, _: cuts.append(cut))
    assert going.stats == {"captures": 1, "replays": 9}
    assert [p for cut in cuts for p in range(cut.start, cut.stop)] == list(range(35))


def test_a_few_batches_are_not_captured_unasked() -> None:
    going = walk(Bumpy(), images(5, 1, 4, 4), graph="auto")
    going.run(lambda *_: None)
    assert going.stats == {"eager_steps": 9}


class Counting(nn.Module):
    """Decides in Python, and takes labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + labels.view(-1, 1, 1, 1)) * self.weight * (1 + self.calls)


@quiet
def test_what_cannot_be_captured_runs_eagerly() -> None:
    x0 = images(5, 1, 4, 4)
    model = Counting()
    labels = torch.tensor([0, 1, 2, 3, 4])
    found = sf.bits_per_dim(
        model, SCHEDULE, x0, condition={"labels": labels}, batch_size=300, graph="step"
    )
    assert bool(torch.isfinite(found.terms).all())
    assert model.weight.requires_grad
    assert model.training
    assert model.weight.grad is None


@quiet
def test_each_pair_has_its_samples_condition() -> None:
    x0 = images(1, 1, 4, 4).expand(3, -1, -1, -1)

    def model(x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        return scale * labels.view(-1, 1, 1, 1) * torch.tanh(x)

    told: dict[str, Any] = {"timesteps": SPACED, "batch_size": 4}
    both = sf.bits_per_dim(
        model, SCHEDULE, x0, condition={"labels": [0.5, 1.0, 2.0], "scale": 0.5}, **told
    )
    for n, label in enumerate((0.5, 1.0, 2.0)):
        one = sf.bits_per_dim(
            model, SCHEDULE, x0[:1], first_index=n,
            condition={"labels": [label], "scale": 0.5}, **told,
        )  # fmt: skip
        assert torch.equal(one.terms[0], both.terms[n])


def test_bytes_are_images() -> None:
    levels = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    found = sf.bits_per_dim(Bumpy(), SCHEDULE, levels, timesteps=SPACED)
    floats = sf.bits_per_dim(Bumpy(), SCHEDULE, levels.float() / 127.5 - 1, timesteps=SPACED)
    torch.testing.assert_close(found.terms, floats.terms, rtol=1e-5, atol=1e-6)


def test_lucidrains_terms() -> None:
    """The divergence and the decoder of denoising-diffusion-pytorch's hybrid loss, in nats."""
    x0 = images(3, 2, 4, 4)
    mean, log_std = x0 + 0.02 * torch.randn_like(x0), torch.randn_like(x0).mul(0.5).sub(4)
    theirs = lucidrains.discretized_gaussian_log_likelihood(x0, means=mean, log_scales=log_std)
    mine = discretised_log_likelihood(x0, mean, log_std.exp(), "tanh")
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    other = lucidrains.normal_kl(x0, log_std, mean, -3 * torch.ones_like(mean))
    torch.testing.assert_close(
        normal_divergence(x0, log_std, mean, -3 * torch.ones_like(mean)), other
    )


@quiet
def test_digits_compiled_or_not_and_in_batches() -> None:
    """The network rounds with its batch, and compiled in another order again."""
    checkpoint = sf.load("digits")
    x0 = sf.Sampler(checkpoint.model, checkpoint.schedule, steps=4).sample(
        (2, *checkpoint.sample_shape), condition={"labels": [3, 7]}
    )
    x0 = ((x0 + 1) * 127.5).round().to(torch.uint8)
    told: dict[str, Any] = {"timesteps": [900, 300, 10, 0], "condition": {"labels": [3, 7]}}
    found = [
        sf.bits_per_dim(checkpoint.model, checkpoint.schedule, x0, **told, **more)
        for more in ({"batch_size": 8}, {"batch_size": 3}, {"optimize": True, "batch_size": 4})
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.total, found[0].total, rtol=1e-3, atol=0)


def test_the_predictions_are_those_of_the_bound() -> None:
    """Their errors are x0_mse; after the last step nothing is wrong."""
    x0 = images(3, 2, 4, 5)
    asked = Bounding(Bumpy(), SCHEDULE, x0, timesteps=SPACED, batch_size=5)
    bound, shown = asked.bound(), asked.predictions([6, 0, 7, 3])
    assert shown.shape == (4, 3, 2, 4, 5)
    assert torch.equal(shown[2], x0)
    for k, i in ((0, 6), (1, 0), (3, 3)):
        errors = (shown[k] - x0).double().square().flatten(1).mean(1)
        torch.testing.assert_close(errors, bound.x0_mse[:, i], rtol=1e-5, atol=1e-7)
    assert torch.equal(asked.predictions([7]), x0[None])


def test_the_step_after_a_part_of_the_bits() -> None:
    bound = sf.bits_per_dim(Bumpy(), SCHEDULE, images(3, 1, 4, 4), timesteps=SPACED)
    rate = bound.rate_distortion().rate
    assert bound.step_after(1) == len(SPACED)
    assert bound.step_after(0) == 0
    for part in (0.1, 0.5, 0.9):
        i = bound.step_after(part)
        assert float(rate[i]) >= part * float(rate[-1])
        assert i == 0 or float(rate[i - 1]) < part * float(rate[-1])
    for value in (-0.1, 1.1, "1", None):
        with pytest.raises((ValueError, TypeError), match="fraction must be"):
            bound.step_after(value)  # type: ignore[arg-type]
