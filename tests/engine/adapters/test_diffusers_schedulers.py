"""Whole loops of the three schedulers against the installed diffusers classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.adapters.schedulers_case import ODD, assert_same, close, pair, run

from stepfuse.engine.adapters.diffusers import ddpm

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
example = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


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


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"])
def test_both_forms_of_the_result(name: str) -> None:
    theirs, ours = pair(name)
    x = torch.randn(ODD)
    forms = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        forms.append(scheduler.step(x, 0, x))
    assert type(forms[0]) is type(forms[1])
    listed = ours.step(x, 0, x, return_dict=False)
    assert type(listed) is tuple
    assert torch.equal(listed[0], forms[1]["prev_sample"])
    assert torch.equal(listed[1], forms[1][1])


def test_the_rule_of_older_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 0.32 DDPM stepped to t - T // S, unless the list was given."""
    monkeypatch.setattr(ddpm, "_BY_STRIDE", True)
    for strict, previous in ((True, 966 - 1000 // 30), (False, 932)):
        scheduler = ddpm.DDPMScheduler(timestep_spacing="trailing", strict=strict)
        scheduler.set_timesteps(30)
        assert scheduler.previous_timestep(966) == previous
        scheduler.set_timesteps(timesteps=[966, 932, 1])
        assert scheduler.previous_timestep(966) == 932


def test_options_of_one_call_say_nothing_of_the_next() -> None:
    theirs, ours = pair("DDIMScheduler")
    x, output = torch.randn(ODD), torch.randn(ODD)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for eta, clipped in ((0.0, False), (0.4, False), (1.0, True), (0.0, True), (0.4, False)):
        results = [
            s.step(
                output,
                700,
                x,
                eta=eta,
                use_clipped_model_output=clipped,
                generator=torch.Generator().manual_seed(1),
            )
            for s in (theirs, ours)
        ]
        close(results[1].prev_sample, results[0].prev_sample, 4.0, f"eta {eta}, {clipped}")
