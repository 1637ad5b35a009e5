"""Every pipeline gives the images it gave before, by the same calls."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tests.engine.adapters.diffusers_models import (
    SAME,
    build,
    call,
    counted,
    mask,
    noise,
    psnr,
    seeded,
    spread,
    unet2d,
)
from torch import Tensor

from stepfuse.engine.adapters.diffusers import accelerate, explain, restore
from stepfuse.engine.compile.runs import has_instructions

STABLE = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
]
PLAIN = ["DDPMPipeline", "DDIMPipeline", "LDMPipeline"]
NAMES = [*PLAIN, "LDMSuperResolutionPipeline", "LDMTextToImagePipeline", *STABLE]


Pair = tuple[Any, Any]  # a pipeline as it was, and its copy accelerated


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """Pairs by name, each built once: compiling takes a second a shape."""
    folder = tmp_path_factory.mktemp("tokenizer")

    @functools.cache
    def made(name: str, **options: Any) -> Pair:
        plain = build(name, folder, **options)
        return plain, accelerate(copy.deepcopy(plain))

    return made


def with_scheduler(pair: Pair, scheduler: Any) -> Pair:
    """The same networks under another scheduler."""
    made = []
    for pipe in pair:
        other = copy.copy(pipe)
        vars(other).pop("_stepfuse", None)
        other.scheduler = copy.deepcopy(scheduler)
        made.append(other)
    return made[0], accelerate(made[1])


def check(pair: Pair, **options: Any) -> None:
    """The same images from both, by compiled networks and our scheduler alone."""
    plain, fast = pair
    assert type(fast.scheduler).__module__.startswith("stepfuse.")
    before = call(plain, **fresh(options))
    assert spread(before) > 0.02
    assert psnr(call(fast, **fresh(options)), before) > SAME
    assert counted(fast.unet, lambda: call(fast, **fresh(options))) == 0


def fresh(options: dict[str, Any]) -> dict[str, Any]:
    """Options in which seeds are generators that start anew."""
    made = dict(options)
    if "seeds" in made:
        made["generator"] = seeded(*made.pop("seeds"))
    return made


@pytest.mark.parametrize("name", NAMES)
def test_images_stay_the_same(name: str, pair: Callable[..., Pair]) -> None:
    check(pair(name))


@pytest.mark.parametrize("name", NAMES)
def test_restored_it_is_as_it_was(name: str, tmp_path: Path) -> None:
    pipe = build(name, tmp_path)
    before = call(pipe)
    held = {**vars(pipe)}, {**vars(pipe.unet)}, {**vars(pipe.scheduler)}, dict(pipe.config)
    assert accelerate(pipe) is pipe
    if name in ("DDPMPipeline", "StableDiffusionPipeline"):
        assert psnr(call(pipe), before) > SAME
    assert restore(pipe) is pipe
    found = vars(pipe), vars(pipe.unet), vars(pipe.scheduler), dict(pipe.config)
    for now, then in zip(found, held, strict=True):
        assert now.keys() == then.keys()
        assert all(now[key] is then[key] or now[key] == then[key] for key in then)
    assert np.array_equal(call(pipe), before)


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch(name: str, pair: Callable[..., Pair]) -> None:
    check(pair(name), batch_size=3)


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_a_generator_per_image(name: str, pair: Callable[..., Pair]) -> None:
    options = {"eta": 0.6} if name == "DDIMPipeline" else {}
    check(pair(name), batch_size=3, seeds=(4, 5, 6), **options)


@pytest.mark.parametrize("name", ["DDIMPipeline", "LDMPipeline", "StableDiffusionPipeline"])
@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_eta(name: str, eta: float, pair: Callable[..., Pair]) -> None:
    check(pair(name), eta=eta)
    assert psnr(call(pair(name)[1], eta=eta), call(pair(name)[1])) < SAME


def test_the_clipped_output_of_the_model(pair: Callable[..., Pair]) -> None:
    check(pair("DDIMPipeline"), use_clipped_model_output=True)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.5, "negative_prompt": "bad"},
        {"guidance_scale": 7.5, "guidance_rescale": 0.7},
        {"prompt": ["a cat", "the dog"], "num_images_per_prompt": 2, "seeds": (1, 2, 3, 4)},
        {"height": 24, "width": 16},
        {"latents": noise(1, 4, 8, 8)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_stable_diffusion(options: dict[str, Any], pair: Callable[..., Pair]) -> None:
    check(pair("StableDiffusionPipeline"), **options)


def test_a_list_of_timesteps(pair: Callable[..., Pair]) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(clip_sample=False, steps_offset=1)
    stable = with_scheduler(pair("StableDiffusionPipeline"), scheduler)
    check(stable, num_inference_steps=None, timesteps=[801, 400, 399, 1])


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_strength_of_image_to_image(strength: float, pair: Callable[..., Pair]) -> None:
    pipes = pair("StableDiffusionImg2ImgPipeline")
    check(pipes, strength=strength, num_inference_steps=5, eta=0.4)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_either_unet(
    channels: int, strength: float, pair: Callable[..., Pair]
) -> None:
    pipes = pair("StableDiffusionInpaintPipeline", in_channels=channels)
    check(pipes, strength=strength, num_inference_steps=5)


def test_the_mask_is_heeded(pair: Callable[..., Pair]) -> None:
    pipe = pair("StableDiffusionInpaintPipeline", in_channels=4)[1]
    nothing = PIL.Image.new("L", (16, 16))
    kept = call(pipe, mask_image=nothing, strength=1.0)
    assert psnr(call(pipe, mask_image=mask(), strength=1.0), kept) < SAME


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_output_types(kind: str, pair: Callable[..., Pair]) -> None:
    before, after = (call(p, output_type=kind) for p in pair("StableDiffusionPipeline"))
    assert type(after) is type(before)
    if kind == "pil":
        before, after = (np.stack([np.asarray(i) for i in x]) / 255.0 for x in (before, after))
    assert psnr(after, before) > SAME


def test_a_tuple_where_no_dict_is_asked_for(pair: Callable[..., Pair]) -> None:
    pipe = pair("DDIMPipeline")[1]
    result = pipe(num_inference_steps=2, output_type="np", return_dict=False)
    assert isinstance(result, tuple)
    assert result[0].shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", STABLE)
def test_callbacks_see_the_same_tensors(name: str, pair: Callable[..., Pair]) -> None:
    before, after = (watched(pipe) for pipe in pair(name))
    assert len(after) == len(before) > 2
    for (step, t, tensors), (old_step, old_t, old_tensors) in zip(after, before, strict=True):
        assert (step, t) == (old_step, old_t)
        assert tensors.keys() == old_tensors.keys() == {"latents", "prompt_embeds"}
        for key, tensor in tensors.items():
            assert psnr(tensor, old_tensors[key]) > SAME
            assert tensor.dtype == old_tensors[key].dtype


def watched(pipe: Any) -> list[tuple[int, int, dict[str, Tensor]]]:
    seen = []

    def look(this: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert this is pipe
        seen.append((step, int(t), {k: v.clone() for k, v in tensors.items()}))
        return tensors

    names = ["latents", "prompt_embeds"]
    call(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    return seen


def test_callbacks_change_the_latents(pair: Callable[..., Pair]) -> None:
    def change(pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            tensors["latents"] = tensors["latents"].flip(-1) * 1.5
        elif step == 2:
            tensors["latents"].mul_(0.9)  # in place: the next step must read it
        return tensors

    check(pair("StableDiffusionPipeline"), callback_on_step_end=change)
    pipe = pair("StableDiffusionPipeline")[1]
    assert psnr(call(pipe, callback_on_step_end=change), call(pipe)) < SAME


def test_a_callback_interrupts(pair: Callable[..., Pair]) -> None:
    steps = []

    def stop(pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    call(pair("StableDiffusionPipeline")[1], callback_on_step_end=stop)
    assert steps == [0, 1]


def test_the_progress_bar(pair: Callable[..., Pair], capsys: pytest.CaptureFixture[str]) -> None:
    pipe = copy.copy(pair("StableDiffusionPipeline")[1])
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    call(pipe, num_inference_steps=5)
    shown = capsys.readouterr().err
    assert "drawing: 100%" in shown
    assert "5/5" in shown


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions(prediction_type: str, pair: Callable[..., Pair]) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        prediction_type=prediction_type, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    check(with_scheduler(pair("DDIMPipeline"), scheduler), num_inference_steps=7, eta=0.5)


def test_a_learned_variance() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = DDPMPipeline(unet2d(3, 6), DDPMScheduler(variance_type="learned_range"))
    pipe.set_progress_bar_config(disable=True)
    check((pipe, accelerate(copy.deepcopy(pipe))))


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "PNDMScheduler",
        "TCDScheduler",
    ],
)
def test_solvers_are_exchanged(name: str, pair: Callable[..., Pair]) -> None:
    import diffusers

    stable = pair("StableDiffusionPipeline")
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, name).from_config(stable[0].scheduler.config, **options)
    plain, fast = with_scheduler(stable, scheduler)
    check((plain, fast))
    assert isinstance(fast.scheduler, type(scheduler))
    assert f"{name} by denoise_step" in explain(fast)
    assert type(restore(fast).scheduler) is type(scheduler)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"predict_x0": False}),
    ],
)
def test_options_without_a_row_leave_the_scheduler(
    name: str, option: dict[str, Any], pair: Callable[..., Pair]
) -> None:
    import diffusers

    stable = pair("StableDiffusionPipeline")
    scheduler = getattr(diffusers, name).from_config(stable[0].scheduler.config, **option)
    _, fast = with_scheduler(stable, scheduler)
    assert type(fast.scheduler) is type(scheduler)
    assert f"left alone: {name}: {next(iter(option))}" in explain(fast)


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "DEISMultistepScheduler"])
def test_other_schedulers_are_left_alone(name: str, pair: Callable[..., Pair]) -> None:
    import diffusers

    stable = pair("StableDiffusionPipeline")
    scheduler = getattr(diffusers, name).from_config(stable[0].scheduler.config)
    plain, fast = with_scheduler(stable, scheduler)
    theirs = fast.scheduler
    assert psnr(call(fast), call(plain)) > SAME
    assert counted(fast.unet, lambda: call(fast)) == 0  # timesteps that are floats too
    assert type(theirs).__module__.startswith("diffusers.")
    assert f"left alone: {name}" in explain(fast)
    assert restore(fast).scheduler is theirs


def test_bfloat16_is_near(pair: Callable[..., Pair]) -> None:
    plain, fast = pair("DDIMPipeline")
    near = accelerate(copy.deepcopy(fast), dtype=torch.bfloat16)
    found = psnr(call(near), call(plain))
    # 8 bits through some layers, four steps; float32 only where the processor has nothing else
    assert found > 25
    assert (found < 70) == has_instructions(torch.device("cpu"), torch.bfloat16)
    assert counted(near.unet, lambda: call(near)) == 0


def test_inside_inference_mode(pair: Callable[..., Pair]) -> None:
    plain, fast = pair("DDIMPipeline")
    fast, before = copy.deepcopy(fast), call(plain)  # copies compile anew
    with torch.inference_mode():
        assert psnr(call(fast), before) > SAME
    assert psnr(call(fast), before) > SAME
