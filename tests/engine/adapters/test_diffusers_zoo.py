"""Every kind of pipeline gives what it gave before, by compiled networks; and is restored."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.adapters.diffusers_models import SAME, counted, psnr, seeded
from tests.engine.adapters.diffusers_models import build as stable_diffusion
from tests.engine.adapters.diffusers_models import call as images
from tests.engine.adapters.diffusers_zoo import ZOO, build, call
from tests.engine.compile.networks import BFLOAT16_LAYERS
from torch import Tensor, nn

from stepfuse.engine.adapters.diffusers import accelerate, explain, restore
from stepfuse.engine.adapters.diffusers.denoiser import forward_of, is_denoiser
from stepfuse.engine.compile.network import CompiledNetwork

DENOISERS = {"ControlNet": 2, "MultiControlNet": 2}


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in vars(pipe).items() if is_denoiser(part)}


def state(pipe: Any) -> tuple[Any, ...]:
    """The parts of a pipeline, what hangs on them, and copies of all weights."""
    parts = {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module)}
    return (
        dict(vars(pipe)),
        {name: dict(vars(part)) for name, part in parts.items()},
        {name: list(part.modules()) for name, part in parts.items()},
        {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()},
        dict(pipe.config),
    )


def assert_same_state(now: tuple[Any, ...], then: tuple[Any, ...]) -> None:
    assert now[0].keys() == then[0].keys()
    for key, value in then[0].items():
        assert now[0][key] is value or (not isinstance(value, nn.Module) and now[0][key] == value)
    for name, held in then[1].items():
        assert now[1][name].keys() == held.keys(), name
    assert now[2] == then[2]
    for name, weights in then[3].items():
        assert now[3][name].keys() == weights.keys()
        assert all(torch.equal(now[3][name][key], weights[key]) for key in weights), name
    assert now[4] == then[4]


def near(found: Tensor, expected: Tensor) -> float:
    """dB, the largest number for the peak."""
    return psnr(found, expected, peak=float(expected.abs().max()))


@pytest.mark.parametrize("name", ZOO)
def test_results_stay_the_same(name: str) -> None:
    pipe = build(name)
    expected = call(pipe, name)
    assert float(expected.double().std()) > 0.005 * float(expected.abs().max()) > 0
    before = state(pipe)
    parts = denoisers(pipe)
    assert len(parts) == DENOISERS.get(name, 1)
    assert accelerate(pipe) is pipe
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "stepfuse")
        assert near(call(pipe, name), expected) > SAME
        for part in parts.values():
            assert counted(part, lambda: call(pipe, name)) == 0
    for part in parts.values():
        forward = forward_of(part)
        assert forward is not None
        assert not forward.originals
        assert all(isinstance(n, CompiledNetwork) for n in forward._fast.networks)
        assert len(forward._fast.networks) == 1
    said = explain(pipe)
    assert all(type(part).__name__ in said for part in parts.values())
    assert "left out" not in said  # every pass has run
    assert "by denoise_step" in said
    assert restore(pipe) is pipe
    assert_same_state(state(pipe), before)
    assert torch.equal(call(pipe, name), expected)


@pytest.mark.parametrize("name", ["StableDiffusionXL", "AnimateDiff", "Flux"])
def test_bfloat16_is_near(name: str) -> None:
    pipe = build(name)
    expected = call(pipe, name)
    accelerate(pipe, dtype=torch.bfloat16)
    found = call(pipe, name)
    # 8 bits through some layers, three steps; float32 only where the processor has nothing else
    assert near(found, expected) > 25
    assert (near(found, expected) < 90) == BFLOAT16_LAYERS
    for part in denoisers(pipe).values():
        assert counted(part, lambda: call(pipe, name)) == 0


@pytest.mark.parametrize("name", ["StableDiffusionXL", "ControlNet", "PixArtAlpha"])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_solvers_are_exchanged(name: str, scheduler: str) -> None:
    import diffusers

    pipe = build(name)
    pipe.scheduler = theirs = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    expected = call(pipe, name)
    accelerate(pipe)
    assert near(call(pipe, name), expected) > SAME
    for part in denoisers(pipe).values():
        assert counted(part, lambda: call(pipe, name)) == 0
    assert f"{scheduler} by denoise_step" in explain(pipe)
    assert restore(pipe).scheduler is theirs


def test_a_controlnet_for_some_of_the_steps() -> None:
    """Its scale is 1 in the first step and 0 in the last: two networks of it, one of the U-Net."""
    name, options = "ControlNet", {"control_guidance_end": 0.5, "num_inference_steps": 4}
    pipe = build(name)
    expected = call(pipe, name, **options)
    accelerate(pipe)
    assert near(call(pipe, name, **options), expected) > SAME
    counts = [len(forward_of(part)._fast.networks) for part in denoisers(pipe).values()]
    assert sorted(counts) == [1, 2]


def test_layers_skipped_for_guidance() -> None:
    """A list of numbers among the arguments."""
    name = "StableDiffusion3"
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    pipe = build(name)
    expected = call(pipe, name, **options)
    assert near(call(pipe, name), expected) < SAME
    accelerate(pipe)
    assert near(call(pipe, name, **options), expected) > SAME


def test_one_of_two_denoisers_that_cannot_be_taken() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="the package accelerate is missing")
    name = "ControlNet"
    pipe = build(name)
    expected = call(pipe, name)
    accelerate(pipe)
    assert near(call(pipe, name), expected) > SAME
    hooks.add_hook_to_module(pipe.controlnet, hooks.ModelHook())
    held = vars(pipe.unet)["forward"], pipe.scheduler
    with pytest.raises(RuntimeError, match="the forward of ControlNetModel was replaced after"):
        restore(pipe)
    assert (vars(pipe.unet)["forward"], pipe.scheduler) == held  # nothing was undone halfway
    hooks.remove_hook_from_module(pipe.controlnet)
    restore(pipe)
    hooks.add_hook_to_module(pipe.controlnet, hooks.ModelHook())
    with pytest.warns(UserWarning, match=r"the controlnet of StableDiffusionControlNetPipeline is"):
        accelerate(pipe)
    assert near(call(pipe, name), expected) > SAME
    assert counted(pipe.unet, lambda: call(pipe, name)) == 0
    assert counted(pipe.controlnet, lambda: call(pipe, name)) > 0
    said = explain(pipe)
    assert "controlnet             left alone: its forward was replaced already" in said


def test_a_model_that_the_user_exchanges() -> None:
    pipe = build("ControlNet")
    accelerate(pipe)
    old, pipe.controlnet = pipe.controlnet, build("ControlNet").controlnet
    accelerate(pipe)
    assert "forward" not in vars(old)
    assert "forward" in vars(pipe.controlnet)
    restore(pipe)
    assert not {"forward"} & {*vars(pipe.controlnet), *vars(pipe.unet)}


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2Img", "Kandinsky22", "AnimateDiff"])
def test_the_vae_too(name: str) -> None:
    pipe = build(name)
    component = "movq" if name == "Kandinsky22" else "vae"
    expected = call(pipe, name)
    before = state(pipe)
    accelerate(pipe, also=[component])
    assert near(call(pipe, name), expected) > SAME
    coders = [getattr(pipe, component).encoder, getattr(pipe, component).decoder]
    assert all(counted(coder, lambda: call(pipe, name)) == 0 for coder in coders)
    ran = [forward_of(coder)._fast is not None for coder in coders]
    assert ran == [name == "StableDiffusionXLImg2Img", True]
    assert f"{component}.decoder" in explain(pipe)
    accelerate(pipe)  # the last options hold
    assert not any("forward" in vars(coder) for coder in coders)
    accelerate(pipe, also={component})
    assert all("forward" in vars(coder) for coder in coders)
    restore(pipe)
    assert_same_state(state(pipe), before)
    assert torch.equal(call(pipe, name), expected)


def test_a_vae_that_tiles() -> None:
    name = "StableDiffusionXL"
    pipe = build(name)
    pipe.vae.enable_tiling()
    options = {"height": 24, "width": 32}
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 16
    expected = call(pipe, name, **options)
    accelerate(pipe, also=["vae"])
    assert near(call(pipe, name, **options), expected) > SAME
    assert counted(pipe.vae.decoder, lambda: call(pipe, name, **options)) == 0


def test_the_text_encoder_too(tmp_path: Path) -> None:
    pipe = stable_diffusion("StableDiffusionPipeline", tmp_path)
    given = {"prompt": ["a cat", "the dog"], "negative_prompt": ["", "bad"]}
    expected = images(pipe, **given, generator=seeded(1, 2))
    encoder = pipe.text_encoder
    accelerate(pipe, also=("text_encoder", "vae"))
    assert psnr(images(pipe, **given, generator=seeded(1, 2)), expected) > SAME
    assert counted(encoder, lambda: images(pipe, **given, generator=seeded(1, 2))) == 0
    assert counted(pipe.vae.decoder, lambda: images(pipe, **given, generator=seeded(1, 2))) == 0
    restore(pipe)
    assert "forward" not in vars(encoder)
    assert np.array_equal(images(pipe, **given, generator=seeded(1, 2)), expected)


def test_components_that_are_none() -> None:
    pipe = build("StableDiffusionXL")
    held = dict(vars(pipe))
    for wrong, error in (
        (["unet"], ValueError),
        ("vae", TypeError),
        (["text_encoder"], ValueError),
    ):
        with pytest.raises(error, match=r"also must be .*(vae|a list of words); got"):
            accelerate(pipe, also=wrong)
    with pytest.raises(ValueError, match=r"also=\['vae'\] asks .*; it needs optimize=True"):
        accelerate(pipe, also=["vae"], optimize=False)
    with pytest.raises(ValueError, match=r"also must be empty for what has no other .*; got"):
        accelerate(pipe.unet, also=["vae"])
    assert vars(pipe) == held
    assert "forward" not in vars(pipe.unet)
