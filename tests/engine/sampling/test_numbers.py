"""Numbers that would turn into NaN, or into another image, without a word."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.sampling.plan import inversion_table, step_table
from stepfuse.engine.sampling.update import Update

SCHEDULE = sf.Schedule.linear()
SHAPE = (2, 3, 4, 4)
ZEROS = torch.zeros(SHAPE)
ROUNDING = 1e-6  # float32, a few operations


def build(**settings: Any) -> sf.Sampler:
    return sf.Sampler(Bumpy(), SCHEDULE, **{"steps": 3, "graph": None, **settings})


# --- guidance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phi", [0.3, 1.0])
@pytest.mark.parametrize("shape", [SHAPE, (2, 1), (2, 1, 1, 1)])
def test_a_mixture_without_a_spread_is_not_rescaled(
    shape: tuple[int, ...], phi: float, dtype: torch.dtype
) -> None:
    """A network that gives zeros, a constant, twice itself without the condition, one pixel."""
    guidance, noise = sf.CFG(2.0, rescale=phi), torch.randn(shape).to(dtype)
    scale = torch.tensor(2.0, dtype=dtype)
    for cond, uncond in (
        (torch.zeros_like(noise), torch.zeros_like(noise)),
        (torch.full_like(noise, 0.1), torch.full_like(noise, 0.3)),
        (torch.full_like(noise, 1.7), torch.full_like(noise, 1.7)),
        (noise, 2 * noise),
        (noise[:, :1].flatten(1)[:, :1].expand(2, 3), noise[:, :1].flatten(1)[:, :1].expand(2, 3)),
        (torch.full((2, 1), 1.5, dtype=dtype), torch.full((2, 1), 0.5, dtype=dtype)),
    ):
        precise = torch.promote_types(dtype, torch.float32)
        mixed = (uncond.to(precise) + 2 * (cond.to(precise) - uncond.to(precise))).to(dtype)
        found = guidance.combine(cond, uncond, scale)
        assert found.dtype is dtype
        assert torch.equal(found, mixed)


def test_a_mixture_that_only_rounding_is_left_of_is_not_rescaled() -> None:
    """cond = 6.5 n, uncond = 7.5 n cancel at scale 7.5, but for rounding of numbers around 50."""
    noise = torch.randn(SHAPE)
    mixed = sf.CFG(7.5, rescale=1.0).combine(6.5 * noise, 7.5 * noise, torch.tensor(7.5))
    assert float(mixed.abs().max()) < 100 * float(noise.abs().max()) * 2.0**-24


def test_a_small_spread_is_rescaled_all_the_same() -> None:
    """In float16 its standard deviation would round to 0, and the ratio be infinite."""
    cond = torch.randn(SHAPE).half()
    uncond = cond * 2 + torch.randn(SHAPE).half() / 4096
    found = sf.CFG(2.0, rescale=1.0).combine(cond, uncond, torch.tensor(2.0))
    spread = found.float().std(dim=(1, 2, 3))
    torch.testing.assert_close(spread, cond.float().std(dim=(1, 2, 3)), rtol=1e-3, atol=0)


def test_a_network_at_its_zero_initialisation_samples() -> None:
    net = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)  # type: ignore[arg-type]

    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    condition = {"labels": torch.tensor([1, 2])}
    images = []
    for rescale in (0.0, 0.7):
        guidance = sf.CFG(3.0, {"labels": None}, rescale=rescale)
        sampler = sf.Sampler(Zero(), SCHEDULE, steps=3, guidance=guidance)
        images.append(sampler.sample(SHAPE, condition=condition))
    torch.testing.assert_close(images[0], images[1], rtol=ROUNDING, atol=ROUNDING)


def constant(x: Tensor, t: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


class Lookalike:
    """Has the methods of a guidance, and is none."""

    def scale_at(self, t: int) -> float:
        return 2.0

    def is_active(self, t: int) -> bool:
        return True


CFG, Classifier = sf.CFG, sf.ClassifierGuidance


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CFG(math.nan), ValueError, "scale must be finite.*got nan"),
        (lambda: CFG(math.inf), ValueError, "scale must be finite.*got inf"),
        (lambda: CFG(-math.inf), ValueError, "scale must be finite.*got -inf"),
        (lambda: CFG(1e39), ValueError, r"scale must be finite, and at most 3\.4e\+38; got 1e\+39"),
        (lambda: CFG(10**400), ValueError, "scale must be finite"),
        (lambda: CFG("3"), TypeError, "scale must be an int or a float; got str '3'"),
        (lambda: CFG(True), TypeError, "scale must be an int or a float; got bool True"),
        (lambda: CFG(None), TypeError, "scale must be an int or a float; got None"),
        (lambda: CFG(3 + 0j), TypeError, "scale must be an int or a float; got complex"),
        (lambda: CFG(torch.tensor(3.0)), TypeError, "scale must .* float; got Tensor"),
        (lambda: CFG([3.0]), TypeError, "scale must .* float; got list"),
        (lambda: CFG(3.0, rescale=math.nan), ValueError, r"rescale must be in \[0, 1\]; got nan"),
        (lambda: CFG(3.0, rescale=1.5), ValueError, r"rescale must be in \[0, 1\]; got 1\.5"),
        (lambda: CFG(3.0, rescale=True), TypeError, "rescale must .* got bool True"),
        (lambda: CFG(3.0, rescale="0.7"), TypeError, "rescale must .* got str '0.7'"),
        (lambda: CFG(3.0, interval=(math.nan, 5)), ValueError, "interval must be finite"),
        (lambda: CFG(3.0, interval=(5, math.nan)), ValueError, "interval must be finite"),
        (lambda: CFG(3.0, interval=(7, 5)), ValueError, r"interval must be \(low, high\).*\(7, 5"),
        (lambda: CFG(3.0, interval=(7,)), TypeError, r"interval must be \(low, high\) or None"),
        (lambda: CFG(3.0, interval=5), TypeError, "interval must be .*got int 5"),
        (lambda: CFG(3.0, interval=("1", 5)), TypeError, "interval must .* got str '1'"),
        (lambda: CFG(3.0, None), TypeError, "unconditional must be a mapping.*got None"),
        (lambda: CFG(3.0, [("labels", None)]), TypeError, "unconditional must .* got list"),
        (lambda: Classifier(constant, math.nan), ValueError, "scale must be finite.*got nan"),
        (lambda: Classifier(constant, -math.inf), ValueError, "scale must be finite.*got -inf"),
        (lambda: Classifier(constant, "1"), TypeError, "scale must .* got str '1'"),
        (lambda: Classifier(constant, torch.ones(2)), TypeError, "scale must .* got Tensor"),
        (lambda: Classifier(3.0), TypeError, r"fn must be callable as fn\(x, t.*got float 3\.0"),
        (lambda: Classifier(None, 1.0), TypeError, "fn must be callable .*got None"),
    ],
)
def test_guidance_that_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    guidance = CFG(np.float32(2.5), rescale=np.float64(0.5), interval=(np.int64(3), np.int64(9)))
    assert guidance == CFG(2.5, rescale=0.5, interval=(3, 9))
    assert type(guidance.scale) is float
    assert Classifier(constant, np.int8(2)).scale_at(3) == 2
    assert Update(eta=np.float64(0.5), clip_sample=np.float32(1)) == Update(eta=0.5)


@pytest.mark.parametrize(
    "guidance", [3.0, True, "cfg", CFG, (CFG(2.0),), {"scale": 2.0}, Lookalike(), constant]
)
def test_what_is_no_guidance(guidance: Any) -> None:
    with pytest.raises(
        TypeError, match=r"guidance must be a CFG, a ClassifierGuidance, .* or None; got"
    ):
        build(guidance=guidance)


# --- the sampler's own numbers


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eta": math.nan}, ValueError, r"eta must be in \[0, 1\]; got nan"),
        ({"eta": "0.5"}, TypeError, "eta must be an int or a float; got str '0.5'"),
        ({"eta": True}, TypeError, "eta must be an int or a float; got bool True"),
        ({"eta": None}, TypeError, "eta must be an int or a float; got None"),
        ({"eta": torch.tensor(0.5)}, TypeError, "eta must .* got Tensor"),
        ({"clip_sample": math.nan}, ValueError, "clip_sample must be positive or None; got nan"),
        ({"clip_sample": math.inf}, ValueError, "clip_sample must be positive or None; got inf"),
        ({"clip_sample": 0}, ValueError, "clip_sample must be positive or None; got 0$"),
        ({"clip_sample": 1e-50}, ValueError, "clip_sample must be positive or None; got 1e-50"),
        ({"clip_sample": 1e39}, ValueError, r"clip_sample must be positive or None; got 1e\+39"),
        ({"clip_sample": True}, TypeError, "clip_sample must .* got bool True"),
        ({"clip_sample": "1"}, TypeError, "clip_sample must .* got str '1'"),
        ({"steps": True}, TypeError, "steps must be an int.*got bool True"),
        ({"steps_offset": 0.5}, TypeError, "steps_offset must be an int; got float"),
        ({"steps_offset": 999}, ValueError, r"steps_offset must be in 0 \.\. 333 for 3 of 1000"),
        ({"steps": "ddim1"}, ValueError, "no whole stride .*'ddim1'"),
        ({"timesteps": [math.nan]}, ValueError, "timesteps must be finite"),
        ({"max_programs": 1.5}, TypeError, "max_programs must be an int; got float"),
        ({"max_programs": True}, TypeError, "max_programs must be an int; got bool"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype must be float32, .*got torch.float8"),
        ({"dtype": torch.complex64}, TypeError, "dtype must be float32, .*got torch.complex64"),
        ({"dtype": "float32"}, TypeError, "dtype must be float32, .*got 'float32'"),
    ],
)
def test_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**settings)


def test_settings_that_are_changed_later() -> None:
    sampler = build()
    with pytest.raises(ValueError, match="eta must be in"):
        sampler.set_timesteps(3, eta=math.nan)
    with pytest.raises(ValueError, match="steps_offset must be in"):
        sampler.set_timesteps(3, steps_offset=500)
    with pytest.raises(ValueError, match="clip_sample must be positive"):
        sampler.encode(ZEROS, clip_sample=math.nan)
    assert sampler.timesteps == [666, 333, 0]


@pytest.mark.parametrize(
    ("dtype", "value", "held"),
    [
        (torch.float32, 1e39, "1e.39"),
        (torch.float16, 1e5, "1e.05"),
        (torch.float16, -1e5, "1e.05"),
        (torch.bfloat16, 3.4e38, "3.4e.38"),
    ],
)
@pytest.mark.parametrize("name", ["x_T", "image", "noise"])
def test_images_that_overflow(name: str, dtype: torch.dtype, value: float, held: str) -> None:
    sampler = build(dtype=dtype)
    shape = (3, *SHAPE) if name == "noise" else SHAPE
    given = torch.zeros(shape, dtype=torch.float64)
    given.view(-1)[5] = value
    with pytest.raises(ValueError, match=rf"{name} must be at most .* in {dtype}.*holds {held}"):
        sampler.sample(SHAPE, **{name: given})
    given.view(-1)[5] = 1.0
    assert sampler.sample(SHAPE, **{name: given}).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x_T": ZEROS.cfloat()}, TypeError, "x_T must be real; got torch.complex64"),
        ({"noise": torch.zeros(3, *SHAPE).cfloat()}, TypeError, "noise must be real; got"),
        ({"image": ZEROS.cdouble()}, TypeError, "image must be real; got torch.complex128"),
        ({"image": ZEROS, "mask": ZEROS.cfloat()}, TypeError, "mask must be real; got"),
        ({"image": ZEROS, "mask": [1]}, TypeError, "mask must be a tensor; got list"),
        ({"image": ZEROS, "mask": ZEROS.double() + 1e-60}, ValueError, "mask must hold 0"),
        ({"image": ZEROS, "strength": "1"}, TypeError, "strength must .* got str '1'"),
        ({"image": ZEROS, "strength": True}, TypeError, "strength must .* got bool True"),
        ({"image": ZEROS, "strength": math.inf}, ValueError, r"\(0, 1\]; got inf"),
        ({"x_T": ZEROS, "start": 500.5}, TypeError, "start must be an int or None; got float"),
        ({"x_T": ZEROS, "start": True}, TypeError, "start must be an int or None; got bool"),
        ({"x_T": ZEROS, "start": math.nan}, TypeError, "start must be .* got float nan"),
        ({"seed": True}, TypeError, "seed must be an int or an int64 tensor; got bool"),
        ({"seed": np.float64(1)}, TypeError, "seed must be an int or an int64 tensor; got float"),
        ({"first_index": True}, TypeError, "first_index must be an int .*got bool"),
        ({"first_index": 2**64}, ValueError, "first_index must fit in 64 bits"),
        ({"shape": (True, 3, 4, 4)}, TypeError, r"whole numbers; got \(True, 3, 4, 4\)"),
        ({"shape": (2.0, 3, 4, 4)}, TypeError, r"whole numbers; got \(2\.0, 3, 4, 4\)"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an int or None; got float"),
        ({"batch_size": True}, TypeError, "batch_size must be an int or None; got bool"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build().sample(**{"shape": SHAPE, **arguments})


def test_integers_of_numpy_are_integers() -> None:
    sampler, n = build(steps=np.int64(3), steps_offset=np.int16(0)), np.int64
    plain = sampler.sample(SHAPE, seed=5, first_index=7, x_T=ZEROS, start=400)
    given = {"seed": n(5), "first_index": n(7), "start": n(400), "batch_size": n(1)}
    shape = tuple(map(n, SHAPE))
    assert torch.equal(sampler.sample(shape, x_T=ZEROS, **given), plain)


# --- tables


def test_a_table_that_float32_cannot_hold() -> None:
    schedule = sf.Schedule.from_betas([0.9] * 90)  # abar falls to 1e-90
    timesteps = list(range(89, -1, -1))
    with pytest.raises(ValueError, match=r"timestep 89 is not finite in float32; abar is 1e-90"):
        step_table(schedule, timesteps, Update())
    with pytest.raises(ValueError, match="not finite in float32"):
        inversion_table(schedule, timesteps, Update(), "current")
    table = step_table(schedule, timesteps, Update(prediction_type="v_prediction"))
    finite = table.float()[:, [c for c in range(16) if c != 6]].isfinite()
    assert bool(finite.all())


def test_classifier_guidance_without_signal() -> None:
    """Where abar is 0 the shift of epsilon would be infinite; that of a mean is not."""
    schedule = SCHEDULE.zero_terminal_snr()
    common = {"steps": 3, "spacing": "trailing", "prediction_type": "v_prediction"}
    guidance = Classifier(constant, 0.1)
    with pytest.raises(ValueError, match="abar is 0 at timestep 999, where a classifier's gradi"):
        sf.Sampler(Bumpy(), schedule, guidance=guidance, **common)
    off = sf.Sampler(Bumpy(), schedule, guidance=Classifier(constant, 0.0), **common)
    assert off.sample(SHAPE).isfinite().all()
    shifted = sf.Sampler(Bumpy(), schedule, guidance=guidance, method="ddpm", **common)
    assert shifted.sample(SHAPE).isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_classifier_guidance_where_there_is_no_noise(prediction_type: str) -> None:
    """At abar = 1 a gradient shifts nothing: epsilon has no weight there."""
    schedule = sf.Schedule.from_betas([0.0, 0.1, 0.2])
    guidance, images = Classifier(constant, 0.1), []
    for timesteps in ([2, 1, 0], [2, 1]):
        settings: dict[str, Any] = {"timesteps": timesteps, "prediction_type": prediction_type}
        sampler = sf.Sampler(Bumpy(), schedule, guidance=guidance, **settings)
        images.append(sampler.sample(SHAPE))
    if prediction_type != "sample":  # whose answer at abar = 1 is the model's
        torch.testing.assert_close(images[0], images[1], rtol=1e-5, atol=1e-5)
    assert images[0].isfinite().all()


def test_schedules_without_a_step_to_take() -> None:
    still = sf.Schedule.from_betas([0.0, 0.1, 0.2])
    sampler = sf.Sampler(Bumpy(), still, timesteps=[2, 1, 0], prediction_type="sample")
    with pytest.raises(ValueError, match="abar is 1 at timestep 0, where 'sample' says nothing"):
        sampler.encode(ZEROS)
    gone = sf.Schedule.from_betas([1.0])
    with pytest.raises(ValueError, match="final_alpha_one must be True"):
        sf.Sampler(Bumpy(), gone, timesteps=[0], prediction_type="sample", final_alpha_one=False)


# --- latents


@pytest.mark.parametrize(
    ("a", "weight", "error", "message"),
    [
        (ZEROS, math.nan, ValueError, "weight must be finite.*got nan"),
        (ZEROS, math.inf, ValueError, "weight must be finite.*got inf"),
        (ZEROS, "0.5", TypeError, "weight must .* got str '0.5'"),
        (ZEROS, True, TypeError, "weight must .* got bool True"),
        (ZEROS, torch.ones(2), ValueError, r"weight must be one number; got shape \(2,\)"),
        (ZEROS, torch.tensor(1j), TypeError, "weight must be one of .*got torch.complex64"),
        (ZEROS.cfloat(), 0.5, TypeError, "a must be one of .*got torch.complex64"),
        (ZEROS.long(), 0.5, TypeError, "a must be one of .*got torch.int64"),
    ],
)
def test_slerp(a: Tensor, weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sf.slerp(a, torch.ones_like(a), weight)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": math.nan}, ValueError, "weight must be finite.*got nan"),
        ({"weight": torch.tensor(0.5)}, TypeError, "weight must .* got Tensor"),
        ({"t": 400.5}, TypeError, "t must be an int; got float"),
        ({"t": True}, TypeError, "t must be an int; got bool"),
        ({"xa": ZEROS.long()}, TypeError, "xa must be one of .*got torch.int64"),
        ({"xb": ZEROS.cfloat()}, TypeError, "xb must be one of .*got torch.complex64"),
    ],
)
def test_interpolate(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"xa": ZEROS, "xb": ZEROS, "weight": 0.5, "t": 400, **changes}
    with pytest.raises(error, match=message):
        sf.interpolate(build(), **given)


# --- memory


def test_a_model_that_returns_another_view_of_x() -> None:
    """The update writes over x, from which the model's output must not be read again."""
    images = []
    for copied in (True, False):

        def model(x: Tensor, t: Tensor, labels: Any = None, copied: bool = copied) -> Tensor:
            turned = x.transpose(2, 3)
            return turned.clone() if copied else turned

        for guidance in (None, sf.CFG(2.0, {"labels": None})):
            for graph in (None, "auto"):
                sampler = sf.Sampler(model, SCHEDULE, steps=3, guidance=guidance, graph=graph)
                images.append(sampler.sample(SHAPE))
    for plain, view in zip(images[:4], images[4:], strict=True):
        assert torch.equal(plain, view)


class Norm(nn.Module):
    """A GroupNorm whose eps is 0 in float32, between convolutions."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16, eps=eps)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.nn.functional.silu(self.norm(self.first(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("eps", [0.0, 1e-50])
@torch.no_grad()
def test_a_network_whose_norm_has_no_eps_keeps_that_norm(eps: float) -> None:
    model, x, t = Norm(eps).eval(), torch.randn(SHAPE), torch.zeros(2, dtype=torch.int64)
    fast = sf.optimize(model, (x, t))
    torch.testing.assert_close(fast(x, t), model(x, t), rtol=1e-4, atol=1e-5)
    assert "an eps that is 0 in float32" in fast.explain()
