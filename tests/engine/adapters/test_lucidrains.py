"""`accelerate` on denoising-diffusion-pytorch: seeded results are the library's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoising_diffusion_pytorch import LearnedGaussianDiffusion
from tests.engine.adapters.lucidrains_case import Bump, bump, check_same, seeded, unet

import stepfuse as sf
from stepfuse.engine.adapters import lucidrains
from stepfuse.engine.adapters.lucidrains import FastDiffusion
from stepfuse.engine.compile.runs import has_instructions
from stepfuse.kernels.step_row import Column

DDIM = [
    {"sampling_timesteps": s, "ddim_sampling_eta": e} for s, e in ((7, 0.0), (7, 0.5), (3, 1.0))
]


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("path", [{}, *DDIM], ids=str)
def test_sample(path: dict[str, Any], schedule: str, objective: str) -> None:
    """Every objective, schedule and path, and as many random numbers drawn as they draw.

    The images on the way say whether DDIM's coefficients are rounded as theirs are.
    """
    diffusion = bump(objective=objective, beta_schedule=schedule, **path)
    theirs = seeded(lambda: diffusion.sample(3, return_all_timesteps=True))
    sf.accelerate(diffusion, optimize=False)
    check_same(seeded(lambda: diffusion.sample(3, return_all_timesteps=True)), theirs)
    check_same(seeded(lambda: diffusion.sample(batch_size=3)), (theirs[0][:, -1], theirs[1]))
    assert theirs[0][:, -1].std() > 0.05


@pytest.mark.parametrize(
    ("self_condition", "path"), [(False, {}), (True, DDIM[1])], ids=["ddpm", "ddim"]
)
def test_unet(self_condition: bool, path: dict[str, Any]) -> None:
    """Their U-Net, compiled; every image on the way, a batch of one and data that is not scaled."""
    diffusion = unet(self_condition, auto_normalize=False, **path)

    def run() -> Any:
        return seeded(lambda: diffusion.sample(1, return_all_timesteps=True))

    theirs = run()
    assert sf.accelerate(diffusion) is diffusion
    ours = run()
    assert ours[0].shape == (1, (12 if not path else 7) + 1, 3, 8, 12)
    check_same(ours, theirs)
    check_same(seeded(lambda: diffusion.sample(1)), (theirs[0][:, -1], theirs[1]))
    assert "prepack_convolutions" in lucidrains.explain(diffusion)


def test_unet_in_bfloat16() -> None:
    diffusion = unet(sampling_timesteps=5)
    theirs, _ = seeded(lambda: diffusion.sample(2))
    ours, _ = seeded(lambda: sf.accelerate(diffusion, dtype=torch.bfloat16).sample(2))
    error = float((ours - theirs).square().mean())
    assert error < 1e-3  # images in [0, 1]: more than 30 dB
    # and not the same arithmetic, unless the processor has no other
    assert (error > 1e-12) == has_instructions(torch.device("cpu"), torch.bfloat16)


def test_p_sample_and_interpolate() -> None:
    diffusion = unet()
    x, a, b = torch.randn(3, 2, 3, 8, 12)

    def run() -> Any:
        return (
            *(diffusion.p_sample(x, t) for t in (11, 5, 0)),
            diffusion.interpolate(a, b, t=4, lam=0.3),
        )

    theirs = seeded(run)
    sf.accelerate(diffusion)
    check_same(seeded(run), theirs)
    with torch.inference_mode():
        check_same(seeded(run), theirs)


def test_learned_variance() -> None:
    diffusion = LearnedGaussianDiffusion(
        Bump(outputs=6), image_size=8, timesteps=60, beta_schedule="linear"
    )
    theirs = seeded(lambda: diffusion.sample(2))
    assert isinstance(vars(sf.accelerate(diffusion))["_stepfuse"], FastDiffusion)
    check_same(seeded(lambda: diffusion.sample(2)), theirs)
    assert "ddim_sample" not in vars(diffusion)
    assert "not replaced           ddim_sample" in lucidrains.explain(diffusion)


def test_float64() -> None:
    """With float64 throughout there is nothing left but the rounding of their buffers."""
    torch.set_default_dtype(torch.float64)
    try:
        diffusion = bump(sampling_timesteps=7, ddim_sampling_eta=0.5).double()
        theirs = seeded(lambda: diffusion.sample(2))
        ours = seeded(lambda: sf.accelerate(diffusion).sample(2))
        assert ours[0].dtype is torch.float64
        check_same(ours, theirs, near=1e-10)
        # a default of float64 against float32 buffers is theirs to handle
        mixed = bump().float()
        check_same(
            seeded(lambda: sf.accelerate(mixed).sample(2)),
            seeded(lambda: sf.restore(mixed).sample(2)),
        )
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("t", [59, 30, 1, 0])
def test_rows_in_float64(t: int) -> None:
    """strict=False: at eta = 1 a row of DDIM is the posterior's, to the digits of float32."""
    diffusion = bump(sampling_timesteps=59, ddim_sampling_eta=1.0, beta_schedule="sigmoid")
    sf.accelerate(diffusion, strict=False)
    row = vars(diffusion)["_stepfuse"]._implicit("pred_x0", (t, t - 1), 1.0)[0]
    assert float(row[Column.C_0]) == pytest.approx(float(diffusion.posterior_mean_coef1[t]), 1e-5)
    if t:
        kept, spread = diffusion.posterior_mean_coef2[t], diffusion.posterior_variance[t].sqrt()
        assert float(row[Column.C_X]) == pytest.approx(float(kept), abs=2e-5)
        assert float(row[Column.SIGMA]) == pytest.approx(float(spread), rel=2e-4)


def test_noise_that_is_not_used() -> None:
    """At eta = 0 they draw noise all the same; strict=False does not, and the images are equal."""
    diffusion = bump(sampling_timesteps=7, ddim_sampling_eta=0.0)
    theirs = seeded(lambda: diffusion.sample(2))
    ours = seeded(lambda: sf.accelerate(diffusion, strict=False).sample(2))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=3e-5)
    assert not torch.equal(ours[1], theirs[1])


def test_dropout_that_is_on() -> None:
    """They do not call eval(): a network in training mode drops, with the same random numbers."""
    diffusion = bump()
    diffusion.model = Bump(dropout=0.5).train()
    theirs = seeded(lambda: diffusion.sample(2))
    sf.accelerate(diffusion)
    check_same(seeded(lambda: diffusion.sample(2)), theirs)
    assert "dropout is on" in lucidrains.explain(diffusion)


def test_settings_changed_afterwards() -> None:
    """Attributes that their methods read at every call are read at every call."""
    diffusion = sf.accelerate(bump(sampling_timesteps=7), optimize=False)
    diffusion.sample(2)
    diffusion.sampling_timesteps, diffusion.ddim_sampling_eta = 4, 0.7
    diffusion.objective = "pred_noise"
    diffusion.model = Bump()
    diffusion.model.weight.data.fill_(0.1)
    diffusion.betas.fill_(0.5)  # is not read when sampling, unlike
    diffusion.alphas_cumprod.mul_(0.9)
    ours = seeded(lambda: diffusion.sample(2))
    check_same(ours, seeded(lambda: sf.restore(diffusion).sample(2)))


@pytest.mark.parametrize("optimize", [True, False])
def test_weights_changed_afterwards(optimize: bool) -> None:
    """Training between two samplings, and a conversion of the whole module."""
    diffusion = sf.accelerate(unet(sampling_timesteps=3), optimize=optimize)
    diffusion.sample(1)
    with torch.no_grad():
        for weight in diffusion.model.parameters():
            weight.mul_(1.1)
    ours = seeded(lambda: diffusion.sample(1))
    check_same(ours, seeded(lambda: sf.restore(diffusion).sample(1)))
    diffusion.model.load_state_dict(unet().model.state_dict(), assign=True)
    ours = seeded(lambda: sf.accelerate(diffusion, optimize=optimize).sample(1))
    check_same(ours, seeded(lambda: sf.restore(diffusion).sample(1)))
