"""Whole trajectories against denoising-diffusion-pytorch's GaussianDiffusion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor, nn

from stepfuse import Sampler, Schedule
from stepfuse.engine.sampling.plan import step_table
from stepfuse.engine.sampling.steps import posterior_log_variance
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.reference.denoise_step import update
from stepfuse.kernels.step_row import Column

TOTAL = 60
SHAPE = (2, 3, 8, 8)
OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
BUFFERS = 2e-5  # its buffers are float32: 1 / sqrt(abar_T) = 15 times 6e-8, over 60 steps


class Network(nn.Module):
    """What their class asks of a network, around `Bumpy`; remembers its timesteps."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self) -> None:
        super().__init__()
        self.timesteps: list[int] = []

    def forward(self, x: Tensor, t: Tensor, self_condition: None) -> Tensor:
        self.timesteps.append(int(t[0]))
        return Bumpy()(x, t)


def theirs(noise: Tensor, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Tensor, list]:
    """Their samples from noise[0] as x_T and noise[1:] in the steps, and their timesteps."""
    network = Network()
    diffusion = GaussianDiffusion(
        network, image_size=8, timesteps=TOTAL, auto_normalize=False, **settings
    ).double()
    drawn: Iterator[Tensor] = iter(noise)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: next(drawn))
        patch.setattr(torch, "randn_like", lambda *_, **__: next(drawn))
        return diffusion.sample(batch_size=2).clone(), network.timesteps


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
@pytest.mark.parametrize(("eta", "steps"), [(0.0, 20), (0.5, 7), (1.0, 12)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddim_sample(
    objective: str, eta: float, steps: int, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randn(steps + 1, *SHAPE, dtype=torch.float64)
    expected, timesteps = theirs(
        noise,
        monkeypatch,
        sampling_timesteps=steps,
        objective=objective,
        ddim_sampling_eta=eta,
        beta_schedule=schedule,
    )
    sampler = Sampler(
        Bumpy(),
        Schedule.linear(TOTAL) if schedule == "linear" else Schedule.sigmoid_alpha(TOTAL),
        timesteps=timesteps,
        eta=eta,
        prediction_type=OBJECTIVES[objective],
        dtype=torch.float64,
        graph=None,
    )
    ours = sampler.sample(SHAPE, x_T=noise[0], noise=noise[1:])
    torch.testing.assert_close(ours, expected, rtol=0, atol=BUFFERS)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_p_sample_loop(objective: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randn(TOTAL + 1, *SHAPE, dtype=torch.float64)
    expected, timesteps = theirs(noise, monkeypatch, objective=objective, beta_schedule=schedule)
    assert timesteps == list(range(TOTAL - 1, -1, -1))
    sampler = Sampler(
        Bumpy(),
        getattr(Schedule, schedule)(TOTAL),
        method="ddpm",
        timesteps=timesteps,
        prediction_type=OBJECTIVES[objective],
        dtype=torch.float64,
    )
    ours = sampler.sample(SHAPE, x_T=noise[0], noise=noise[1:])
    # cosine: x0 is divided by sqrt(abar_T) = 7e-4 at the start, and mostly clipped there
    near = BUFFERS if schedule == "linear" else 1e-4
    torch.testing.assert_close(ours, expected, rtol=0, atol=near)


def test_posterior() -> None:
    """Their q_posterior at every timestep, and the variance that clamps at 1e-20."""
    schedule = Schedule.linear(TOTAL)
    diffusion = GaussianDiffusion(
        Network(), image_size=8, timesteps=TOTAL, beta_schedule="linear"
    ).double()
    every = list(range(TOTAL - 1, -1, -1))
    ours = posterior_log_variance(schedule, every, "clamp")
    torch.testing.assert_close(
        ours.flip(0), diffusion.posterior_log_variance_clipped, rtol=1e-6, atol=0
    )
    x0, x = torch.randn(2, TOTAL, 3, 2, 2, dtype=torch.float64)
    t = torch.arange(TOTAL)
    mean, variance, _ = diffusion.q_posterior(x0, x, t)
    ancestral = Update(method="ddpm", prediction_type="sample", clip_sample=None)
    for row, i in zip(step_table(schedule, every, ancestral), every, strict=True):
        x_s, _ = update(x[i : i + 1], x0[i : i + 1], None, row, None, False)
        torch.testing.assert_close(x_s[0], mean[i], rtol=1e-6, atol=1e-6)
        assert float(row[Column.SIGMA]) ** 2 == pytest.approx(float(variance[i]), rel=1e-6)
