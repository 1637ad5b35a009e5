"""Training, copies and `restore` of accelerated diffusions, and the classes that are refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import denoising_diffusion_pytorch as library
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion, Unet
from denoising_diffusion_pytorch.classifier_free_guidance import (
    GaussianDiffusion as GuidedDiffusion,
)
from denoising_diffusion_pytorch.classifier_free_guidance import Unet as GuidedUnet
from ema_pytorch import EMA
from tests.engine.adapters.lucidrains_case import Bump, bump, check_same, seeded, unet

import stepfuse as sf
from stepfuse.engine.adapters import lucidrains


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_training(objective: str) -> None:
    """Loss and gradients with self-conditioning, offset noise and min-SNR weights."""
    diffusion = unet(
        self_condition=True,
        objective=objective,
        offset_noise_strength=0.1,
        min_snr_loss_weight=True,
    ).train()
    images = torch.rand(3, 3, 8, 12)

    def run() -> Any:
        diffusion.zero_grad()
        loss = diffusion(images)
        loss.backward()
        return loss.detach(), [weight.grad.clone() for weight in diffusion.parameters()]

    theirs = seeded(run)
    sf.accelerate(diffusion)
    check_same(seeded(run), theirs)
    assert float(theirs[0][0]) > 0


def test_q_sample() -> None:
    """Per-sample timesteps; drawn, given and broadcast noise; gradients; dtypes that are theirs."""
    diffusion = bump(beta_schedule="linear", timesteps=1000)  # 1 - abar_0 is 1e-4
    x, noise = torch.randn(2, 3, 3, 8, 8)
    t = torch.tensor([0, 999, 17])

    def run() -> Any:
        leaf, source = x.clone().requires_grad_(), noise.clone().requires_grad_()
        diffusion.q_sample(leaf, t, source).square().sum().backward()
        return [
            diffusion.q_sample(x, t),
            diffusion.q_sample(x_start=x, t=t, noise=noise),
            diffusion.q_sample(x, t, noise[:1]),
            diffusion.q_sample(x.bfloat16(), t, noise.bfloat16()),
            leaf.grad,
            source.grad,
        ]

    theirs = seeded(run)
    sf.accelerate(diffusion)
    check_same(seeded(run), theirs, near=1e-6)


def test_q_sample_of_immiscible_diffusion() -> None:
    """The noise is assigned to the samples by them."""
    diffusion = bump(immiscible=True)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 5, 17, 59])
    theirs = seeded(lambda: diffusion.q_sample(x, t))
    sf.accelerate(diffusion)
    check_same(seeded(lambda: diffusion.q_sample(x, t)), theirs)
    assert "immiscible" in lucidrains.explain(diffusion)


def test_restore_is_exact() -> None:
    diffusion = unet(sampling_timesteps=3)
    own = lambda *args: None  # noqa: E731
    diffusion.q_sample = own  # an attribute of the object itself, not of its class
    before, weights = dict(vars(diffusion)), diffusion.state_dict()
    assert sf.restore(diffusion) is diffusion  # nothing to take back
    sf.accelerate(diffusion, dtype=torch.bfloat16)
    sf.accelerate(diffusion)  # twice is once, with the last options
    diffusion.sample(1)
    assert diffusion.state_dict().keys() == weights.keys()
    assert [name for name, _ in diffusion.named_modules()] == [n for n, _ in unet().named_modules()]
    assert sf.restore(diffusion) is diffusion
    assert vars(diffusion).keys() == before.keys()
    assert all(vars(diffusion)[name] is value for name, value in before.items())


def pickled(diffusion: GaussianDiffusion) -> GaussianDiffusion:
    return pickle.loads(pickle.dumps(diffusion))


def saved(diffusion: GaussianDiffusion) -> GaussianDiffusion:
    file = io.BytesIO()
    torch.save(diffusion, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies(copied: Callable[[GaussianDiffusion], GaussianDiffusion]) -> None:
    """A copy is an accelerated diffusion of its own: its weights are the ones it uses."""
    # their attention holds an enumeration of torch's that does not pickle
    diffusion = sf.accelerate((unet if copied is copy.deepcopy else bump)(sampling_timesteps=3))
    first = seeded(lambda: diffusion.sample(1))
    other = copied(diffusion)
    check_same(seeded(lambda: other.sample(1)), first, near=1e-6)
    with torch.no_grad():
        list(other.model.parameters())[-1].add_(1)
    changed = seeded(lambda: other.sample(1))
    assert (changed[0] - first[0]).abs().max() > 1e-3
    check_same(seeded(lambda: diffusion.sample(1)), first, near=0)
    check_same(seeded(lambda: sf.restore(other).sample(1)), changed)


def test_ema_copy() -> None:
    """What their trainer does: an EMA of an accelerated diffusion samples with its own weights."""
    diffusion = sf.accelerate(unet(sampling_timesteps=3))
    ema = EMA(diffusion, beta=0.5, update_every=1, update_after_step=0)
    for _ in range(3):
        with torch.no_grad():
            diffusion.model.final_conv.weight.add_(0.05)
        ema.update()
        ours = seeded(lambda: ema.ema_model.sample(1))
        plain = sf.restore(copy.deepcopy(ema.ema_model))
        check_same(ours, seeded(lambda plain=plain: plain.sample(1)))


def test_hooks_are_called() -> None:
    diffusion, seen = sf.accelerate(unet(sampling_timesteps=3)), []
    diffusion.model.mid_block1.register_forward_hook(lambda *_: seen.append(1))
    diffusion.sample(1)
    assert len(seen) == 3


class OwnPosterior(GaussianDiffusion):
    def q_posterior(self, *args: Any, **kwargs: Any) -> Any:
        return super().q_posterior(*args, **kwargs)


class Renamed(GaussianDiffusion):
    """Nothing of sampling is changed."""

    def p_losses(self, *args: Any, **kwargs: Any) -> Any:
        return super().p_losses(*args, **kwargs)


def small(**settings: Any) -> Unet:
    return Unet(8, dim_mults=(1,), **settings)


REFUSED: dict[str, Callable[[], Any]] = {
    "WeightedObjectiveGaussianDiffusion": lambda: library.WeightedObjectiveGaussianDiffusion(
        small(out_dim=8), image_size=8
    ),
    "ContinuousTimeGaussianDiffusion": lambda: library.ContinuousTimeGaussianDiffusion(
        small(random_fourier_features=True), image_size=8
    ),
    "VParamContinuousTimeGaussianDiffusion": lambda: library.VParamContinuousTimeGaussianDiffusion(
        small(random_fourier_features=True), image_size=8
    ),
    "ElucidatedDiffusion": lambda: library.ElucidatedDiffusion(
        small(random_fourier_features=True), image_size=8
    ),
    "GaussianDiffusion1D": lambda: library.GaussianDiffusion1D(
        library.Unet1D(8, dim_mults=(1,), channels=2), seq_length=8
    ),
    "classifier_free_guidance.GaussianDiffusion": lambda: GuidedDiffusion(
        GuidedUnet(8, num_classes=2, dim_mults=(1,)), image_size=8
    ),
    "OwnPosterior": lambda: OwnPosterior(Bump(), image_size=8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """One TypeError with the class, what is supported, and nothing changed."""
    diffusion = REFUSED[name]()
    before = dict(vars(diffusion))
    supported = r"supported: denoising_diffusion_pytorch\.GaussianDiffusion .*LearnedGaussian"
    for call in (sf.accelerate, sf.restore, lucidrains.explain):
        with pytest.raises(TypeError, match=rf"cannot accelerate .*{name}.*{supported}"):
            call(diffusion)
    assert vars(diffusion) == before


def test_reasons() -> None:
    with pytest.raises(TypeError, match="it has a q_posterior of its own"):
        sf.accelerate(OwnPosterior(Bump(), image_size=8))
    with pytest.raises(TypeError, match=r"for a network use stepfuse\.optimize"):
        sf.accelerate(small())
    with pytest.raises(TypeError, match=r"no option 'graph'.*accepted: optimize, dtype, strict"):
        sf.accelerate(bump(), graph="auto")
    with pytest.raises(
        ValueError, match=r"dtype must be one of None, torch.float32.*got torch\.int8"
    ):
        sf.accelerate(bump(), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference.*got 'cuda'"):
        sf.accelerate(bump(), backend="cuda")
    assert lucidrains.explain(bump()) == "not accelerated"


def test_subclasses_with_the_same_sampling() -> None:
    diffusion = Renamed(Bump(), image_size=8, timesteps=10)
    theirs = seeded(lambda: diffusion.sample(2))
    check_same(seeded(lambda: sf.accelerate(diffusion).sample(2)), theirs)
    learned = LearnedGaussianDiffusion(Bump(outputs=6), image_size=8, timesteps=10)
    assert sf.restore(sf.accelerate(learned)) is learned
