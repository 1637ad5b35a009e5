"""What `accelerate` takes for a diffusion, what it leaves alone, and that `restore` is exact."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.engine.adapters import guided_diffusion_oracle as oracle
from tests.engine.adapters.guided_diffusion_case import SHAPE, Network, betas, compare, diffusion
from tests.engine.compile.networks import BFLOAT16_LAYERS
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.adapters import guided_diffusion
from stepfuse.engine.networks.unet import UNet, UNetConfig


def sample(d: Any, model: Any = None, **options: Any) -> Tensor:
    torch.manual_seed(5)
    return d.p_sample_loop(model or Network(False), SHAPE, **options)


class LargerNoise(oracle.Diffusion):
    """A sampler of its own."""

    def variances(self, *args: Any) -> tuple[Tensor, Tensor]:
        variance, std = super().variances(*args)
        return variance, 1.01 * std


class OwnGuidance(oracle.Diffusion):
    """Guides with half the gradient."""

    def variances(self, *args: Any) -> tuple[Tensor, Tensor]:
        variance, std = super().variances(*args)
        return 0.5 * variance, std


class SkippingLoop(oracle.Diffusion):
    """A loop with an argument of its own."""

    def p_sample_loop(self, *args: Any, skip_timesteps: int = 0, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().p_sample_loop(*args, **kwargs) + skip_timesteps


class RoundedLoop(oracle.Diffusion):
    """A loop with the usual arguments that does something more."""

    def descend(self, *args: Any) -> Any:
        for results in super().descend(*args):
            yield {**results, "sample": results["sample"].round(decimals=1)}


class Failing(oracle.Diffusion):
    def reverse(self, *args: Any) -> Any:
        raise NotImplementedError("a sampler to come")


def test_restore_is_exact() -> None:
    d = diffusion()
    own = d.q_sample
    d.q_sample = own  # an attribute of the object itself
    before = dict(vars(d))
    plain = sample(d)
    state = torch.get_rng_state()
    assert sf.restore(d) is d  # nothing to take back
    sf.accelerate(d)
    sf.accelerate(d, optimize=False)  # twice is once
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(d)) > set(before)
    torch.testing.assert_close(sample(d), plain, rtol=1e-5, atol=1e-5)
    assert sf.restore(d) is d
    assert vars(d) == before
    assert vars(d)["q_sample"] is own
    assert torch.equal(sample(d), plain)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))]
)
def test_copies(copied: Any) -> None:
    d = sf.accelerate(diffusion(), optimize=False)
    expected = sample(d)
    other = copied(d)
    assert torch.equal(sample(other), expected)
    if copied is not copy.copy:
        assert vars(other)["_stepfuse"].diffusion is other
        assert vars(other)["p_sample"].__self__ is vars(other)["_stepfuse"]
    sf.restore(other)
    assert "p_sample" not in vars(other)
    assert "p_sample" in vars(d)


def test_improved_diffusion() -> None:
    """Its methods have no cond_fn, so that model_kwargs stands where it stood."""
    d = oracle.Improved(betas(60))
    model, y = Network(False), torch.tensor([0.0, 1.0, 2.0])
    compare(
        d,
        lambda d: [
            d.p_sample_loop(model, SHAPE, None, True, None, {"y": y}),
            d.p_sample(model, torch.ones(SHAPE), torch.full((3,), 4), True, None, {"y": y}),
        ],
    )
    with pytest.raises(TypeError, match="cond_fn"):
        d.p_sample_loop(model, SHAPE, cond_fn=torch.cos)


def test_wrapped_model() -> None:
    """A model that maps the timesteps itself is told the index."""
    d = sf.accelerate(diffusion(spaced=[0, 30, 59]), optimize=False)
    model = Network(False)

    class Wrapped:
        timestep_map = d.timestep_map

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return model(x, torch.tensor(self.timestep_map)[t])

    sample(d, Wrapped(), device="cpu")
    assert model.heard == [59, 30, 0]


def test_a_function_needs_a_device() -> None:
    d = sf.accelerate(diffusion(), optimize=False)
    model = Network(False)
    expected = sample(d, model)
    function = lambda x, t: model(x, t)  # noqa: E731
    assert torch.equal(sample(d, function, device="cpu"), expected)
    with pytest.raises(TypeError, match="give device="):
        sample(d, function)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    d = sf.accelerate(diffusion(), optimize=False)
    sample(d)
    assert capsys.readouterr().err == ""
    sample(d, progress=True)
    assert "12/12" in capsys.readouterr().err


def test_other_steps_are_left_alone() -> None:
    """p_sample differs and stays theirs; DDIM agrees and is replaced."""
    d = LargerNoise(betas(60))
    plain = sample(d)
    sf.accelerate(d, optimize=False)
    assert torch.equal(sample(d), plain)
    assert not {"p_sample", "p_sample_loop"} & set(vars(d))
    assert {"ddim_sample", "ddim_sample_loop", "q_sample"} <= set(vars(d))
    assert "not replaced           p_sample: its results are not" in guided_diffusion.explain(d)


def test_other_guidance_is_left_alone() -> None:
    d = OwnGuidance(betas(60))
    how = {"cond_fn": lambda x, t: torch.cos(x), "model_kwargs": {}}
    guided, plain = sample(d, **how), sample(d)
    sf.accelerate(d, optimize=False)
    assert torch.equal(sample(d, **how), guided)
    torch.testing.assert_close(sample(d), plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(guided, plain)
    assert "p_sample with cond_fn: its results" in guided_diffusion.explain(d)


def test_other_loops_are_left_alone() -> None:
    d = SkippingLoop(betas(60))
    plain = sample(d, skip_timesteps=3)
    sf.accelerate(d, optimize=False)
    assert "p_sample_loop" not in vars(d)
    assert "p_sample" in vars(d)
    torch.testing.assert_close(sample(d, skip_timesteps=3), plain, rtol=1e-5, atol=1e-5)


def test_loops_that_do_more_are_left_alone() -> None:
    d = RoundedLoop(betas(60))
    plain = sample(d)
    sf.accelerate(d, optimize=False)
    torch.testing.assert_close(sample(d), plain, rtol=0, atol=0.02)
    assert torch.equal(sample(d), sample(d).round(decimals=1))
    assert {"p_sample", "ddim_sample"} <= set(vars(d))
    assert not {name for name in vars(d) if "_loop" in name and "reverse" not in name}


def test_what_cannot_be_accelerated() -> None:
    with pytest.raises(TypeError, match=r"Failing: it fails on a small example: NotImpl.* to come"):
        sf.accelerate(Failing(betas(60)))
    unknown = oracle.Diffusion(betas(60), model_mean_type="epsilon")
    with pytest.raises(TypeError, match=r"model_mean_type is 'epsilon'; accepted: PREVIOUS_X"):
        sf.accelerate(unknown)
    with pytest.raises(TypeError, match=r"cannot accelerate .*; supported: .*SpacedDiffusion of"):
        guided_diffusion.accelerate(object())
    with pytest.raises(TypeError, match=r"supported: .*SpacedDiffusion of"):
        sf.accelerate(oracle.Diffusion)  # the class, not an object
    with pytest.raises(ValueError, match=r"dtype must be one of None, .*got"):
        sf.accelerate(diffusion(), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference.*got 'cuda'"):
        sf.accelerate(diffusion(), backend="cuda")


def test_strict() -> None:
    """At eta = 0 they draw noise that they do not use; strict=False does not."""
    d, model = diffusion(), Network(False)

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return d.ddim_sample_loop(model, SHAPE), torch.get_rng_state()

    theirs, state = run()
    sf.accelerate(d, strict=False, optimize=False)
    ours, after = run()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(after, state)


def network() -> UNet:
    """A small U-Net with random weights."""
    torch.manual_seed(0)
    config = UNetConfig(base_channels=8, channel_multipliers=(1, 2), norm_groups=4, dropout=0.5)
    model = UNet(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def images(d: Any, model: UNet) -> Tensor:
    torch.manual_seed(5)
    return d.ddim_sample_loop(model, (1, 3, 8, 8))


def test_bfloat16() -> None:
    d, model = diffusion(), network()
    plain = images(d, model)
    error = float((images(sf.accelerate(d, dtype=torch.bfloat16), model) - plain).square().mean())
    assert error < 4e-3  # images in [-1, 1]: more than 30 dB
    # in another arithmetic, but where float32 is faster, as on processors without bfloat16
    assert error > 1e-12 or not BFLOAT16_LAYERS


def test_weights_changed_afterwards() -> None:
    """Training, EMA or a checkpoint between two loops."""
    d, model = sf.accelerate(diffusion()), network()
    first = images(d, model)
    with torch.no_grad():
        model.conv_in.weight.mul_(1.5)
    second = images(d, model)
    assert not torch.allclose(first, second, atol=1e-3)
    expected = images(sf.restore(d), model)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


def test_dropout_that_is_on() -> None:
    d, model = diffusion(), network().train()
    plain = images(d, model)
    torch.testing.assert_close(images(sf.accelerate(d), model), plain, rtol=1e-4, atol=1e-4)
    assert "dropout is on" in guided_diffusion.explain(d)
    assert not torch.allclose(images(d, model.eval()), plain, atol=1e-3)


def test_hooks_are_called() -> None:
    d, model, seen = sf.accelerate(diffusion()), network(), []
    model.conv_in.register_forward_hook(lambda *_: seen.append(1))
    images(d, model)
    assert len(seen) == d.num_timesteps
