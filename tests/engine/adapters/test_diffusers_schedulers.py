"""Whole loops of the three schedulers against the installed diffusers classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.adapters.schedulers_case import ODD, assert_same, close, pair, run

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SPACINGS = ["leading", "trailing", "linspace"]
CLIPS: list[dict[str, Any]] = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.4},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
]
VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", "other"]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("clip", CLIPS, ids=["free", "clip", "range", "threshold"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clipped", [False, True], ids=["raw", "rederived"])
def test_ddim(
    prediction: str, clip: dict[str, Any], spacing: str, eta: float, clipped: bool
) -> None:
    theirs, ours = pair(
        "DDIMScheduler", prediction_type=prediction, timestep_spacing=spacing, **clip
    )
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
        loops.append(run(scheduler, eta=eta, use_clipped_model_output=clipped))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("clip", CLIPS, ids=["free", "clip", "range", "threshold"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm(prediction: str, clip: dict[str, Any], spacing: str, variance: str) -> None:
    channels = 2 * ODD[1] if variance.startswith("learned") else None
    theirs, ours = pair(
        "DDPMScheduler",
        prediction_type=prediction,
        timestep_spacing=spacing,
        variance_type=variance,
        **clip,
    )
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6)
        loops.append(run(scheduler, channels=channels))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", CLIPS[:3], ids=["free", "clip", "range"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_inverse(prediction: str, clip: dict[str, Any], spacing: str, to_one: bool) -> None:
    theirs, ours = pair(
        "DDIMInverseScheduler",
        prediction_type=prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=to_one,
        **clip,
    )
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(9)
        loops.append(run(scheduler, generators=0))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


def test_the_inverse_of_a_model_of_x0_is_not_finite_at_its_first_step_in_both() -> None:
    """It starts at abar = 1, where such a model says nothing of epsilon."""
    outputs = []
    for scheduler in pair("DDIMInverseScheduler", prediction_type="sample", set_alpha_to_one=True):
        scheduler.set_timesteps(5)
        x = torch.randn(ODD)
        outputs.append(scheduler.step(torch.randn(ODD), 0, x).prev_sample)
    assert not outputs[0].isfinite().any()
    assert not outputs[1].isfinite().any()
    theirs, ours = pair(
        "DDIMInverseScheduler", prediction_type="sample", set_alpha_to_one=False, steps_offset=1
    )
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        loops.append(run(scheduler, generators=0))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


common = {
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "beta_end": st.sampled_from([0.012, 0.02]),
    "num_train_timesteps": st.sampled_from([1000, 123, 40]),
    "steps_offset": st.sampled_from([0, 1]),
    "prediction_type": st.sampled_from(PREDICTIONS),
    "timestep_spacing": st.sampled_from(SPACINGS),
    "rescale_betas_zero_snr": st.booleans(),
    "clip_sample": st.booleans(),
    "clip_sample_range": st.sampled_from([1.0, 2.5]),
    "thresholding": st.booleans(),
    "sample_max_value": st.sampled_from([0.9, 1.0, 3.0]),  # errors grow by 1 / s each step
}
example = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@example
@given(
    config=st.fixed_dictionaries({**common, "set_alpha_to_one": st.booleans()}),
    steps=st.integers(1, 39),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    clipped=st.booleans(),
)
def test_ddim_in_any_configuration(
    config: dict[str, Any], steps: int, eta: float, clipped: bool
) -> None:
    theirs, ours = pair("DDIMScheduler", **config)
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
        loops.append(run(scheduler, shape=(1, 3, 4, 3), eta=eta, use_clipped_model_output=clipped))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


@example
@given(
    config=st.fixed_dictionaries(
        {
            **common,
            "beta_schedule": st.sampled_from(["linear", "sigmoid", "laplace"]),
            "variance_type": st.sampled_from(VARIANCES),
        }
    ),
    steps=st.integers(1, 39),
    custom=st.one_of(st.none(), st.sets(st.integers(0, 39), min_size=1)),
)
def test_ddpm_in_any_configuration(
    config: dict[str, Any], steps: int, custom: set[int] | None
) -> None:
    theirs, ours = pair("DDPMScheduler", **config)
    channels = 6 if config["variance_type"].startswith("learned") else None
    loops = []
    for scheduler in (theirs, ours):
        if custom is None:
            scheduler.set_timesteps(steps)
        else:
            scheduler.set_timesteps(timesteps=sorted(custom, reverse=True))
        loops.append(run(scheduler, shape=(1, 3, 4, 3), channels=channels))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_every_step_count_gives_their_timesteps(name: str, spacing: str, offset: int) -> None:
    if name == "DDIMInverseScheduler" and spacing == "linspace":
        spacing = "leading"
    theirs, ours = pair(
        name, num_train_timesteps=1000, timestep_spacing=spacing, steps_offset=offset
    )
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.timesteps.dtype is theirs.timesteps.dtype
    for steps in range(1, 1001, 1 if offset else 7):
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps, device="cpu")
        assert torch.equal(ours.timesteps, theirs.timesteps), steps
        assert ours.num_inference_steps == theirs.num_inference_steps


def test_ddpm_without_set_timesteps_walks_the_training_schedule() -> None:
    theirs, ours = pair("DDPMScheduler", num_train_timesteps=60)
    loops = [run(scheduler, shape=(2, 1, 3)) for scheduler in (theirs, ours)]
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)
    assert ours.previous_timestep(5) == theirs.previous_timestep(5) == 4


def test_timesteps_outside_the_list_and_in_any_order() -> None:
    theirs, ours = pair("DDIMScheduler")
    order = [401, 3, 999, 0, 500, 401]
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(50)
        loops.append(run(scheduler, steps=order, eta=0.5))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_batch_of_generators(name: str) -> None:
    loops = []
    theirs, ours = pair(name)
    kwargs = {"eta": 1.0} if name == "DDIMScheduler" else {}
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        loops.append(run(scheduler, generators=ODD[0], **kwargs))
    assert len(loops[0].states) == ODD[0]
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("steps", [4, 30])
def test_the_noise_is_theirs_to_the_bit(name: str, steps: int) -> None:
    """With x = output = 0 a step gives sigma z, one product."""
    zeros = torch.zeros(ODD)
    theirs, ours = pair(name, timestep_spacing="trailing")
    kwargs = {"eta": 0.9} if name == "DDIMScheduler" else {}
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(3)
        results.append(
            [
                scheduler.step(zeros, t, zeros, generator=generator, **kwargs).prev_sample
                for t in scheduler.timesteps
            ]
        )
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
    assert float(results[0][0].abs().max()) > 0


def test_without_a_generator_the_global_one_is_used() -> None:
    states = []
    for scheduler in pair("DDPMScheduler"):
        torch.manual_seed(4)
        scheduler.set_timesteps(3)
        run(scheduler, generators=0)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_variance_noise_is_used_as_it_is() -> None:
    theirs, ours = pair("DDIMScheduler")
    noise = torch.randn(ODD)
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        loops.append(run(scheduler, generators=0, eta=1.0, variance_noise=noise))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)


def test_fixed_large_log_is_nan_in_both_wherever_noise_is_added() -> None:
    theirs, ours = pair("DDPMScheduler", variance_type="fixed_large_log")
    loops = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
        loops.append(run(scheduler))
    assert_same(loops[1], loops[0], theirs.alphas_cumprod)
    assert loops[1].samples[0].isnan().all()


SHAPES = [(1, 1), (2, 3), (5,), (), (0, 3, 4, 4), (1, 3, 2, 2, 2), (1, 1, 1, 1)]


@pytest.mark.parametrize(
    ("shape", "thresholding"),
    [*((shape, False) for shape in SHAPES), ((2, 3, 4), True), ((1, 3, 2, 2, 2), True)],
)
def test_shapes(shape: tuple[int, ...], thresholding: bool) -> None:
    theirs, ours = pair("DDIMScheduler", thresholding=thresholding)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        results.append(scheduler.step(0.3 * x + 0.1, 400, x))
    assert results[1].prev_sample.shape == shape
    close(results[1].prev_sample, results[0].prev_sample, 1.0, "x")
    close(results[1].pred_original_sample, results[0].pred_original_sample, 3.0, "x0")


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced"])
def test_layouts(layout: str) -> None:
    base = torch.randn(4, 6, 5, 7)
    x = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "permuted": base.permute(1, 0, 3, 2),
        "sliced": base[:, ::2],
    }[layout]
    output = torch.randn(x.shape)
    results = []
    for scheduler in pair("DDIMScheduler"):
        scheduler.set_timesteps(5)
        results.append(scheduler.step(output, 400, x).prev_sample)
    close(results[1], results[0], 4.0, "x")


def test_broadcast_outputs_as_in_theirs() -> None:
    x, output = torch.randn(4, 3, 5, 5), torch.randn(1, 3, 5, 5)
    results = []
    for scheduler in pair("DDIMScheduler"):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, 400, x, eta=1.0, generator=generator).prev_sample)
    close(results[1], results[0], 4.0, "x")


HALVES = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_half_precision(name: str, dtype: torch.dtype, output_dtype: torch.dtype) -> None:
    """Of their dtype; and as near to the float32 step as one rounding, which theirs is not."""
    x = torch.randn(ODD, generator=torch.Generator().manual_seed(1)).to(dtype)
    output = torch.randn(ODD, generator=torch.Generator().manual_seed(2)).to(output_dtype)
    theirs, ours = pair(name)
    kwargs = {"eta": 0.8} if name == "DDIMScheduler" else {}
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for t in (900, 500, 100, 0):
        a = theirs.step(output, t, x, generator=torch.Generator().manual_seed(5), **kwargs)
        b = ours.step(output, t, x, generator=torch.Generator().manual_seed(5), **kwargs)
        assert b.prev_sample.dtype is a.prev_sample.dtype
        assert b.pred_original_sample.dtype is a.pred_original_sample.dtype
        noise = torch.randn(ODD, generator=torch.Generator().manual_seed(5), dtype=output_dtype)
        exact = _exact_step(name, theirs, output, t, x, noise, kwargs)
        wide = b.prev_sample.dtype is torch.float32
        unit = 1e-6 if wide else HALVES[b.prev_sample.dtype]
        error = (b.prev_sample.double() - exact).abs()
        assert (error <= unit * exact.abs() + 2e-6).all()
        assert (a.prev_sample.double() - exact).abs().max() <= 16 * HALVES[dtype] * 4


def _exact_step(
    name: str,
    scheduler: Any,
    output: torch.Tensor,
    t: int,
    x: torch.Tensor,
    noise: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Their step in float64 on the same numbers, with the given noise."""
    x, output, noise = x.double(), output.double(), noise.double()
    if name == "DDIMScheduler":
        return scheduler.step(output, t, x, variance_noise=noise, **kwargs).prev_sample
    mean = scheduler.step(output, 0, x).prev_sample if t == 0 else None
    if mean is not None:
        return mean
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = scheduler._get_variance(t).double().sqrt()
    return scheduler.step(output, t, x, generator=generator).prev_sample + std * (noise - drawn)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"])
def test_float64(name: str) -> None:
    results = []
    x = torch.randn(ODD, dtype=torch.float64)
    output = torch.randn(ODD, dtype=torch.float64)
    for scheduler in pair(name):
        scheduler.set_timesteps(10)
        kwargs = {} if name == "DDIMInverseScheduler" else {"generator": torch.manual_seed(3)}
        results.append(scheduler.step(output, 500, x, **kwargs))
    # their float32 coefficients, applied in float64
    for key in ("prev_sample", "pred_original_sample"):
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-6, atol=1e-6)


def test_gradients_flow_as_in_theirs() -> None:
    grads = []
    for scheduler in pair("DDIMScheduler", clip_sample=False):
        scheduler.set_timesteps(5)
        x = torch.linspace(-1, 1, 30).reshape(1, 2, 3, 5).requires_grad_()
        output = x.detach().flip(-1).requires_grad_()
        result = scheduler.step(output, 600, x)
        (result.prev_sample.square().sum() + result.pred_original_sample.sum()).backward()
        grads.append((x.grad, output.grad))
    for mine, other in zip(*grads[::-1], strict=True):
        close(mine, other, 20.0, "gradient")
