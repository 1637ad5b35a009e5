"""`accelerate` on objects like guided-diffusion's: the steps of an independent implementation.

Where the environment variable GUIDED_DIFFUSION names a checkout of guided-diffusion, the same tests
run against its own classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.adapters.guided_diffusion_case import (
    NEAR,
    SHAPE,
    STEPS,
    Network,
    compare,
    diffusion,
    gradient,
)
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.adapters import guided_diffusion
from stepfuse.engine.networks.unet import UNet, UNetConfig

LIBRARIES = ["oracle", "guided_diffusion"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "PREVIOUS_X"])
def test_p_sample_loop(mean: str, var: str, library: str) -> None:
    model = Network(var.startswith("LEARNED"))
    d = diffusion(library, mean, var)

    def run(d: Any) -> Tensor:
        return d.p_sample_loop(model, SHAPE, model_kwargs={"y": torch.tensor([0.0, 1.0, 2.0])})

    ours = compare(d, run)
    assert ours.std() > 0.05
    assert model.heard[:STEPS] == model.heard[STEPS:] == [float(5 * i) for i in range(11, -1, -1)]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "PREVIOUS_X"])
def test_ddim_sample_loop(mean: str, eta: float, clip: bool, library: str) -> None:
    """With a learned variance, which DDIM does not read, and from noise that is given."""
    model, d = Network(True), diffusion(library, mean, "LEARNED_RANGE")
    noise = torch.randn(SHAPE)
    before = noise.clone()

    def run(d: Any) -> list[Tensor]:
        return [
            d.ddim_sample_loop(model, SHAPE, eta=eta, clip_denoised=clip, device="cpu"),
            d.ddim_sample_loop(model, list(SHAPE), noise, clip, eta=eta),
        ]

    compare(d, run, near=NEAR if clip else 2e-4)
    assert torch.equal(noise, before)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("spaced", [[0, 1, 2, 40, 59], [7], list(range(60))], ids=len)
def test_timesteps(spaced: list[int], rescale: bool, library: str) -> None:
    """Any set of timesteps, a single one too, and scaled to 0..1000 as floating numbers."""
    if len(spaced) == 1 and library == "guided_diffusion":
        pytest.skip("theirs cannot be built of one timestep")
    model, d = Network(False), diffusion(library, spaced=spaced, rescale=rescale)
    compare(d, lambda d: d.p_sample_loop(model, (1, 2, 3, 3)))
    half = len(model.heard) // 2
    assert model.heard[half:] == model.heard[:half]
    assert max(model.heard) == pytest.approx(spaced[-1] * (1000 / 60 if rescale else 1))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_classifier_guidance(loop: str, var: str, library: str) -> None:
    model, d = Network(var.startswith("LEARNED")), diffusion(library, var=var)
    kwargs = {"model_kwargs": {"y": torch.tensor([0.0, 1.0, 2.0])}}
    plain = compare(d, lambda d: getattr(d, loop)(model, SHAPE, **kwargs))
    sf.restore(d)
    guided = compare(
        d, lambda d: getattr(d, loop)(model, SHAPE, cond_fn=gradient, **kwargs), near=2e-4
    )
    assert (guided - plain).abs().max() > 0.01


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("cond_fn", [None, gradient])
def test_progressive(cond_fn: Any, loop: str, library: str) -> None:
    """Every result, each in memory of its own; a caller may exchange the sample on the way."""
    model, d = Network(False), diffusion(library)

    def run(d: Any) -> list[dict[str, Tensor]]:
        found = []
        name = f"{loop}_progressive"
        for i, out in enumerate(getattr(d, name)(model, SHAPE, cond_fn=cond_fn, model_kwargs={})):
            found.append(dict(out))
            if i == 4:
                out["sample"] = out["sample"].flip(0)
        return found

    ours = compare(d, run, near=2e-4)
    assert len(ours) == STEPS
    assert len({out["sample"].data_ptr() for out in ours}) == STEPS
    assert set(ours[0]) == {"sample", "pred_xstart"}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_a_gradient_that_draws(loop: str, library: str) -> None:
    """Random numbers of a cond_fn come before the step's in DDIM, after them in DDPM."""
    model, d = Network(False), diffusion(library)

    def noisy(x: Tensor, t: Tensor) -> Tensor:
        return torch.randn_like(x)

    how = {"cond_fn": noisy, "model_kwargs": {}}
    how |= {"eta": 0.7} if loop == "ddim_sample_loop" else {}
    compare(d, lambda d: getattr(d, loop)(model, SHAPE, **how), near=2e-4)


@pytest.mark.parametrize("library", LIBRARIES)
def test_gradients_stay_on_between_the_steps(library: str) -> None:
    """Theirs leave them off for whoever reads a generator in the meantime."""
    d = sf.accelerate(diffusion(library), optimize=False)
    for _ in d.p_sample_loop_progressive(Network(False), SHAPE):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("step", ["p_sample", "ddim_sample", "ddim_reverse_sample"])
def test_single_steps(step: str, library: str) -> None:
    """Direct calls: first, middle and last timestep, and timesteps that differ in a batch."""
    model, d = Network(False), diffusion(library)
    x = torch.randn(SHAPE)

    def run(d: Any) -> list[Any]:
        every = [torch.full((3,), i) for i in (STEPS - 1, 5, 0)]
        results = [getattr(d, step)(model, x, t) for t in (*every, torch.tensor([0, 3, 7]))]
        return [*results, getattr(d, step)(model, x[:1], every[1][:1], clip_denoised=False)]

    compare(d, run)
    assert getattr(d, step)(model, x, torch.full((3,), 4))["sample"].requires_grad


@pytest.mark.parametrize("library", LIBRARIES)
def test_reverse_loop(library: str) -> None:
    """The whole way up, which guided-diffusion leaves to the caller, is added and taken away."""
    d = diffusion(library, spaced=list(range(60)))
    model = Network(False)

    def up(d: Any) -> Tensor:
        x = x0
        for i in range(59):
            x = d.ddim_reverse_sample(model, x, torch.full((3,), i), clip_denoised=False)["sample"]
        return x

    x0 = torch.randn(SHAPE).clamp(-1, 1)
    with torch.no_grad():
        latent = up(d)
    assert not hasattr(d, "ddim_reverse_sample_loop")
    sf.accelerate(d, optimize=False)
    ours = d.ddim_reverse_sample_loop(model, x0, clip_denoised=False)
    torch.testing.assert_close(ours, latent, rtol=2e-4, atol=2e-4)
    sf.restore(d)
    assert not hasattr(d, "ddim_reverse_sample_loop")


@pytest.mark.parametrize("library", LIBRARIES)
def test_denoised_fn_is_theirs(library: str) -> None:
    model, d = Network(False), diffusion(library)
    compare(
        d,
        lambda d: [
            d.p_sample_loop(model, SHAPE, denoised_fn=torch.tanh),
            d.ddim_sample_loop(model, SHAPE, denoised_fn=torch.tanh),
            d.p_sample(model, torch.ones(SHAPE), torch.full((3,), 4), denoised_fn=torch.tanh),
        ],
    )
    assert "denoised_fn" in guided_diffusion.explain(d)


@pytest.mark.parametrize("library", LIBRARIES)
def test_q_sample(library: str) -> None:
    """Per-sample timesteps, drawn and given noise, gradients, and dtypes that are theirs."""
    d = diffusion(library)
    x, noise = torch.randn(2, *SHAPE)
    t = torch.tensor([0, 11, 4])

    def run(d: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        d.q_sample(leaf, t, noise).square().sum().backward()
        assert leaf.grad is not None
        wide = d.q_sample(x.bfloat16(), t, noise=noise.bfloat16())
        return [d.q_sample(x, t), d.q_sample(x, t, noise=noise), leaf.grad, wide]

    compare(d, run)


@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
def test_float64(var: str) -> None:
    """In float64 the rows and the oracle agree to its digits: no coefficient is merely near."""
    for mean in ("EPSILON", "START_X", "PREVIOUS_X"):
        model, d = Network(var.startswith("LEARNED")).double(), diffusion("oracle", mean, var)
        noise = torch.randn(SHAPE, dtype=torch.float64)

        def run(d: Any, model: Any = model, noise: Tensor = noise) -> list[Tensor]:
            how = {"noise": noise, "cond_fn": gradient, "model_kwargs": {}}
            return [
                d.p_sample_loop(model, SHAPE, **how),
                d.ddim_sample_loop(model, SHAPE, eta=0.6, **how),
                d.ddim_reverse_sample(model, noise, torch.full((3,), 3))["sample"],
            ]

        compare(d, run, near=1e-9)


def test_optimized_network() -> None:
    """A U-Net is compiled once for all loops and follows its weights."""
    config = UNetConfig(
        base_channels=8, channel_multipliers=(1, 2), norm_groups=4, attention_factors=(2,)
    )
    torch.manual_seed(0)
    model = UNet(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    d = diffusion()
    compare(d, lambda d: d.ddim_sample_loop(model, (1, 3, 8, 12), eta=0.5), optimize=True)
    assert "hoist_timestep" in guided_diffusion.explain(d)
    with torch.no_grad():
        model.conv_out.weight.mul_(2)
    sf.restore(d)
    compare(d, lambda d: d.ddim_sample_loop(model, (1, 3, 8, 12), eta=0.5), optimize=True)
