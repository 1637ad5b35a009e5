"""PiGDM and DPS in the captured step: counts, batches, seeds, precision, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy, Gaussian
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.sampling.lint import check_capturable

LINEAR = sf.Schedule.linear()
SHAPE = (2, 3, 8, 8)
A = sf.inverse.Downsample(4)
OPERATORS: dict[str, Any] = {
    "mask": sf.inverse.Mask((torch.arange(64).view(8, 8) % 3 > 0).float()),
    "outpaint": sf.inverse.Outpaint(2),
    "downsample": A,
    "blur": sf.inverse.Blur(1.0),
    "radon": sf.inverse.Radon(3),
    "dense": sf.inverse.Dense(torch.ones(2, 192), (3, 8, 8)),
}
GUIDANCES: dict[str, Any] = {
    "pigdm": lambda a: sf.PiGDM(a, 0.1, data_std=0.6),
    "paper": lambda a: sf.PiGDM(a, 0.1, weight="paper"),
    "dps": lambda a: sf.DPS(a, 0.7),
}


class Net(nn.Module):
    """Two convolutions and a nonlinearity, with weights that want gradients."""

    def __init__(self, channels: int = 3, out: int = 3) -> None:
        super().__init__()
        draw = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.first = nn.Conv2d(channels, 5, 3, padding=1)
        self.last = nn.Conv2d(5, out, 3, padding=1)
        torch.random.set_rng_state(draw)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t.to(x.dtype).view(-1, 1, 1, 1) / 1000
        y: Tensor = self.last(torch.tanh(self.first(x) + phase))
        return y


def image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def sampler(guidance: Any, model: Any = None, **settings: Any) -> sf.Sampler:
    chosen = {"steps": 4, "eta": 1.0, **settings}
    return sf.Sampler(model or Net().eval(), LINEAR, guidance=guidance, **chosen)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", GUIDANCES)
def test_every_step_is_a_replay_of_one_capture(name: str, operator: str) -> None:
    """Another y, seed, eta and number of steps need no other."""
    a = OPERATORS[operator]
    one = sampler(GUIDANCES[name](a))
    y = a(image())
    first = one.sample(SHAPE, seed=1, measurement=y)
    assert one.stats()["captures"] == 1
    assert (one.stats()["replays"], one.stats()["eager_steps"]) == (4, 0)
    other = one.sample(SHAPE, seed=1, measurement=a(image(1)))
    assert float((other - first).abs().max()) > 1e-3
    assert not torch.equal(one.sample(SHAPE, seed=2, measurement=y), first)
    one.set_timesteps(7, eta=0.3)
    one.sample(SHAPE, measurement=y)
    one.set_timesteps(4, eta=1.0)
    assert torch.equal(one.sample(SHAPE, seed=1, measurement=y), first)
    assert one.stats()["captures"] == 1
    assert (one.stats()["replays"], one.stats()["eager_steps"]) == (4 * 4 + 7, 0)
    eager = sampler(GUIDANCES[name](a), graph=None)
    torch.testing.assert_close(
        eager.sample(SHAPE, seed=1, measurement=y), first, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", GUIDANCES)
def test_the_lint_finds_nothing(name: str, operator: str) -> None:
    guidance = GUIDANCES[name](OPERATORS[operator])
    one = sampler(guidance)
    check_capturable(one, SHAPE)
    one.sample(SHAPE, measurement=OPERATORS[operator](image()))  # and leaves nothing behind


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_batch_of_two_is_two_singles(name: str) -> None:
    """In float64 to the bit, for an elementwise model."""
    guidance = GUIDANCES[name](A)
    one = sampler(guidance, Bumpy(), dtype=torch.float64)
    y = A(image().double())
    both = one.sample(SHAPE, seed=3, measurement=y)
    for n in range(2):
        alone = one.sample((1, *SHAPE[1:]), seed=3, first_index=n, measurement=y[n : n + 1])
        assert torch.equal(alone, both[n : n + 1])
    assert torch.equal(one.sample(SHAPE, seed=3, measurement=y, batch_size=1), both)


@pytest.mark.parametrize("name", GUIDANCES)
def test_batches_of_a_network(name: str) -> None:
    one = sampler(GUIDANCES[name](A))
    shape = (5, 3, 8, 8)
    y = A(image(0, shape))
    whole = one.sample(shape, seed=3, measurement=y)
    split = one.sample(shape, seed=3, measurement=y, batch_size=2)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


def test_the_network_is_as_before() -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    one = sampler(sf.PiGDM(A), model)
    y = A(image())
    kept = y.clone()
    one.sample(SHAPE, measurement=y)
    assert torch.equal(y, kept)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", GUIDANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_between_the_steps(name: str, dtype: torch.dtype) -> None:
    y = A(image())
    half = sampler(GUIDANCES[name](A), dtype=dtype).sample(SHAPE, measurement=y)
    full = sampler(GUIDANCES[name](A)).sample(SHAPE, measurement=y)
    assert half.dtype == dtype
    # x is rounded to 8 or 11 bits four times
    near = 0.1 if dtype == torch.bfloat16 else 0.02
    assert float((half.float() - full).abs().mean()) < near


def test_a_learned_variance() -> None:
    one = sampler(
        sf.PiGDM(A, 0.1), Net(out=6), method="ddpm", variance_type="learned_range", eta=0.0
    )
    x = one.sample(SHAPE, measurement=A(image()))
    assert x.shape == SHAPE
    assert bool(torch.isfinite(x).all())


def residual(guidance: Any, **settings: Any) -> float:
    """|A x - y| for a model that knows its data, N(.3, .5^2)."""
    y = A(image())
    one = sampler(guidance, Gaussian(LINEAR), clip_sample=None, **settings)
    given = {} if guidance is None else {"measurement": y}
    return float((A(one.sample(SHAPE, **given)) - y).norm())


@pytest.mark.parametrize("method", ["dpmpp", "heun", "unipc", "euler"])
def test_solvers_take_the_score(method: str) -> None:
    settings: dict[str, Any] = {"method": method, "eta": 0.0, "steps": 10}
    guided = residual(sf.PiGDM(A, 0.05, data_std=0.5), **settings)
    assert guided < 0.3 * residual(None, **settings)


@pytest.mark.parametrize("guidance", [sf.PiGDM(A, 0.1, data_std=0.5), sf.DPS(A, 3.0)])
def test_what_is_measured_is_found(guidance: Any) -> None:
    assert residual(guidance, steps=50) < 0.5 * residual(None, steps=50)


def test_an_optimised_model_says_that_the_original_runs() -> None:
    model = Net().eval()
    one = sampler(sf.PiGDM(A, 0.1), model, optimize=True)
    y = A(image())
    expected = sampler(sf.PiGDM(A, 0.1), model).sample(SHAPE, measurement=y)
    torch.testing.assert_close(one.sample(SHAPE, measurement=y), expected, rtol=1e-5, atol=1e-5)
    assert "vector-Jacobian product" in one.explain()
    assert "of the original network" in one.explain()
    assert "of the original network" not in sampler(sf.PiGDM(A)).explain()
    assert "vector-Jacobian" not in sampler(None).explain()


class Physics:
    """Somebody else's operator, whose factor can be changed."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def A(self, x: Tensor) -> Tensor:
        return x * self.factor

    def A_adjoint(self, y: Tensor) -> Tensor:
        return y * self.factor


def test_the_operators_of_others() -> None:
    """The same as a matrix, and a captured step that follows their state."""
    physics, y = Physics(0.5), image() / 2
    half = sf.inverse.Dense(torch.eye(192) / 2, (3, 8, 8))
    expected = sampler(sf.PiGDM(half, 0.1)).sample(SHAPE, measurement=y.flatten(1))
    one = sampler(sf.PiGDM(physics, 0.1))
    torch.testing.assert_close(one.sample(SHAPE, measurement=y), expected, rtol=1e-4, atol=1e-4)
    assert one.stats()["eager_steps"] == 0
    physics.factor = 0.25
    quarter = sf.inverse.Dense(torch.eye(192) / 4, (3, 8, 8))
    expected = sampler(sf.PiGDM(quarter, 0.1)).sample(SHAPE, measurement=y.flatten(1))
    torch.testing.assert_close(one.sample(SHAPE, measurement=y), expected, rtol=1e-4, atol=1e-4)


def test_encoding_needs_no_measurement() -> None:
    one = sampler(sf.PiGDM(A, 0.1), eta=0.0)
    assert torch.equal(one.encode(image()), sampler(None, eta=0.0).encode(image()))


def test_iterate_and_copies() -> None:
    one = sampler(sf.PiGDM(A, 0.1))
    y = A(image())
    expected = one.sample(SHAPE, measurement=y)
    assert torch.equal(list(one.iterate(SHAPE, measurement=y))[-1].x, expected)
    assert torch.equal(copy.deepcopy(one).sample(SHAPE, measurement=y), expected)


def measured(y: Any, guidance: Any = None, **settings: Any) -> Any:
    return sampler(guidance or sf.PiGDM(A), **settings).sample(SHAPE, measurement=y)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: sf.PiGDM(A, -0.1), "noise must be 0 or more; got -0.1"),
        (lambda: sf.PiGDM(A, data_std=0), "data_std must be positive; got 0"),
        (lambda: sf.PiGDM(A, weight="none"), "weight must be one of score, paper; got 'none'"),
        (lambda: sf.DPS(A, -1), "scale must be 0 or more; got -1"),
        (lambda: measured(None), r"needs measurement=y, of shape \(2, 3, 2, 2\); got None"),
        (lambda: measured(image()), r"measurement must have shape \(2, 3, 2, 2\); got \(2, 3, 8,"),
        (lambda: measured(A(image()) / 0), "measurement must be finite"),
        (lambda: sampler(None).sample(SHAPE, measurement=A(image())), "measurement needs a guid"),
        (
            lambda: sampler(sf.CFG(1.0)).sample(SHAPE, measurement=A(image())),
            "measurement needs a guidance that it is for",
        ),
        (lambda: measured(A(image()), sf.PiGDM(sf.inverse.Downsample(3))), "factor must divide 8"),
        (lambda: sampler(sf.PiGDM(A), prediction_type="mean"), "a model that predicts 'mean'"),
        (lambda: sampler(sf.DPS(A), method="heun", eta=0.0), "got 'heun'; accepted: 'ddim'"),
        (
            lambda: sf.Sampler(
                Net(), LINEAR.zero_terminal_snr(), prediction_type="v_prediction",
                timesteps=[999, 500], guidance=sf.PiGDM(A),
            ),
            "abar is 0 at timestep 999",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


class Blind(nn.Module):
    """A model that autograd does not see, and says so."""

    differentiable = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.detach()


class Silent(nn.Module):
    """One that says nothing of it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.detach()


def test_models_without_a_gradient() -> None:
    with pytest.raises(ValueError, match="takes a gradient of the model, and this one has none"):
        sampler(sf.DPS(A), Blind())
    assert sf.OnnxDenoiser.differentiable is sf.TensorRTDenoiser.differentiable is False
    with pytest.raises(TypeError, match="and its output has none; accepted: a model that runs"):
        sampler(sf.DPS(A), Silent(), graph=None).sample(SHAPE, measurement=A(image()))


def test_objects_that_are_no_operators() -> None:
    with pytest.raises(TypeError, match=r"A must be an operator.*got object, which has no A and"):
        sf.PiGDM(object())
    with pytest.raises(TypeError, match="cfg must be a CFG or None; got ClassifierGuidance"):
        sf.PiGDM(A, cfg=sf.ClassifierGuidance(lambda x, t: x))  # type: ignore[arg-type]

    class Wrong(Physics):
        def A_adjoint(self, y: Tensor) -> Tensor:
            return y[..., :1]

    with pytest.raises(ValueError, match=r"an adjoint that gives \[1, 3, 8, 8\].*\[1, 3, 8, 1\]"):
        measured(image(), sf.DPS(Wrong(1.0)))


class Towards:
    """A guidance of a user's own that asks for a measurement: x is pulled to it."""

    evaluations = 1

    def measured_shape(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[int, ...]:
        return shape

    def outputs(self, denoiser: Any, x: Tensor, t: Tensor, condition: Any) -> sf.Outputs:
        return sf.Outputs(denoiser(x, t, condition), shift=(denoiser.measurement - x) / 4)


def test_a_guidance_of_ones_own_gets_the_measurement() -> None:
    one = sampler(Towards())
    near, far = (one.sample(SHAPE, measurement=torch.full(SHAPE, v)) for v in (0.0, 50.0))
    assert float((far - near).mean()) > 10
    assert one.stats()["captures"] == 1
    assert one.stats()["eager_steps"] == 0
    with pytest.raises(ValueError, match="needs measurement=y"):
        one.sample(SHAPE)
