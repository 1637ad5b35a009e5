"""An accelerated pipeline that is saved, copied, moved, shared, changed and restored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.adapters.diffusers_models import SAME, build, call, counted, least_unet2d, psnr
from tests.engine.compile.networks import BFLOAT16_LAYERS

import stepfuse as sf
from stepfuse.engine.adapters.diffusers import accelerate, explain, restore

NAME = "StableDiffusionPipeline"
SMALL = {"channels": (8,)}  # of a Stable Diffusion; compiles in a fraction of a second


@pytest.fixture
def pipe() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    torch.manual_seed(0)
    made = DDIMPipeline(least_unet2d(), DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def ours(pipe: Any) -> bool:
    return type(pipe.scheduler).__module__.startswith("stepfuse.")


def test_the_top_level_functions(pipe: Any) -> None:
    before = call(pipe)
    assert sf.accelerate(pipe) is pipe
    assert ours(pipe)
    assert psnr(call(pipe), before) > SAME
    assert sf.restore(pipe) is pipe
    assert not ours(pipe)


def test_the_scheduler_keeps_class_name_configuration_and_state(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(7)
    theirs = pipe.scheduler
    found = accelerate(pipe).scheduler
    assert type(found).__name__ == "DDIMScheduler"
    assert found.config == theirs.config
    assert found.num_inference_steps == 7
    assert torch.equal(found.timesteps, theirs.timesteps)
    theirs.alphas_cumprod = theirs.alphas_cumprod * 0.5  # as a user may have set it
    assert torch.equal(accelerate(restore(pipe)).scheduler.alphas_cumprod, theirs.alphas_cumprod)


def test_twice_is_harmless_and_the_last_options_hold(pipe: Any) -> None:
    scheduler = pipe.scheduler
    accelerate(pipe)
    before = call(pipe)
    held = dict(vars(pipe)), dict(vars(pipe.unet))
    accelerate(pipe)
    assert (dict(vars(pipe)), dict(vars(pipe.unet))) == held
    assert counted(pipe.unet, lambda: call(pipe)) == 0  # nothing was compiled again
    assert np.array_equal(call(pipe), before)
    assert pipe.scheduler.strict
    assert not accelerate(pipe, strict=False).scheduler.strict
    accelerate(pipe, dtype=torch.bfloat16)
    # float32 goes on where it is faster, as on processors without bfloat16
    assert psnr(call(pipe), before) < 70 or not BFLOAT16_LAYERS
    accelerate(pipe, optimize=False)
    assert "forward" not in vars(pipe.unet)
    assert "optimize=False" in explain(pipe)
    assert restore(pipe).scheduler is scheduler


def test_restore_without_accelerate(pipe: Any) -> None:
    held = dict(vars(pipe)), dict(vars(pipe.unet))
    assert restore(pipe) is pipe
    assert restore(restore(accelerate(pipe))) is pipe
    assert (vars(pipe), vars(pipe.unet)) == held
    assert explain(pipe) == "not accelerated"


def test_wrong_options_change_nothing(pipe: Any) -> None:
    held = dict(vars(pipe)), dict(vars(pipe.unet))
    for options, error in [
        ({"dtype": torch.int8}, ValueError),
        ({"dtype": torch.bfloat16, "optimize": False}, ValueError),
        ({"strict": None}, TypeError),
        ({"optimize": 1}, TypeError),
    ]:
        with pytest.raises(error, match=r"got|needs"):
            accelerate(pipe, **options)
    assert (dict(vars(pipe)), dict(vars(pipe.unet))) == held


def test_pipelines_without_a_denoiser_are_refused() -> None:
    from diffusers import DiffusionPipeline

    class Another(DiffusionPipeline):  # type: ignore[misc]
        pass

    for change in (accelerate, restore, explain):
        with pytest.raises(TypeError, match=r"Another; supported: models of diffusers .*pipelines"):
            change(Another())


def test_strict_false_takes_the_next_timestep(pipe: Any) -> None:
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    # 1000 / 30 is no integer: their t - T // S is not the next entry of their list
    before = call(pipe, num_inference_steps=30)
    assert psnr(call(accelerate(pipe), num_inference_steps=30), before) > SAME
    fixed = call(accelerate(pipe, strict=False), num_inference_steps=30)
    assert psnr(fixed, before) < SAME
    assert "strict=False" in explain(pipe)


@pytest.mark.parametrize("name", ["DDPMPipeline", NAME])
def test_what_is_saved_loads_without_stepfuse(name: str, tmp_path: Path) -> None:
    pipe = build(name, tmp_path, **SMALL)
    before = call(pipe)
    pipe.save_pretrained(tmp_path / "before")
    accelerate(pipe)
    call(pipe)
    pipe.save_pretrained(tmp_path / "after")
    files = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "before", tmp_path / "after")
    ]
    assert files[0] == files[1]
    for file in files[0]:
        saved = [(tmp_path / folder / file).read_bytes() for folder in ("before", "after")]
        assert saved[0] == saved[1], file
    assert json.loads((tmp_path / "after" / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        type(pipe.scheduler).__name__,
    ]
    loaded = type(pipe).from_pretrained(tmp_path / "after")
    loaded.set_progress_bar_config(disable=True)
    assert not ours(loaded)
    assert psnr(call(loaded), before) > 2 * SAME  # memory of another alignment, another order


def test_pipelines_made_of_its_components(tmp_path: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = accelerate(build(NAME, tmp_path, **SMALL))
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet
    assert list(other.config["scheduler"]) == ["diffusers", "DDIMScheduler"]
    expected = call(other)
    accelerate(other)
    restore(other)  # which had nothing of its own to give back
    assert "forward" in vars(pipe.unet)
    assert np.array_equal(call(other), expected)
    assert counted(pipe.unet, lambda: call(pipe)) == 0
    restore(pipe)
    assert psnr(call(other), expected) > SAME


def test_a_unet_that_was_accelerated_before_stays_so(pipe: Any) -> None:
    accelerate(pipe.unet)
    restore(accelerate(pipe))
    assert "forward" in vars(pipe.unet)
    accelerate(pipe)
    restore(pipe.unet)
    restore(pipe)
    assert "forward" not in vars(pipe.unet)


def test_copies_are_their_own(pipe: Any) -> None:
    accelerate(pipe)
    before = call(pipe)
    other = copy.deepcopy(pipe)
    assert np.array_equal(call(other), before)
    assert counted(other.unet, lambda: call(other)) == 0
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(0.5)
    assert psnr(call(other), before) < SAME
    assert np.array_equal(call(pipe), before)
    restore(other)
    assert not ours(other)
    assert ours(pipe)
    assert "forward" in vars(pipe.unet)


def test_what_the_user_exchanges_stays(pipe: Any) -> None:
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    accelerate(pipe)
    euler = pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    old, new = pipe.unet, least_unet2d()
    pipe.unet = new
    assert restore(pipe).scheduler is euler
    assert pipe.unet is new
    assert "forward" not in vars(old)
    pipe.scheduler = DDPMScheduler()
    accelerate(pipe)
    assert ours(pipe)
    assert "forward" in vars(new)
    assert pipe.config["unet"][0] == "diffusers"


def test_moved_and_converted(pipe: Any) -> None:
    accelerate(pipe)
    before = call(pipe)
    assert pipe.to(torch.float64) is pipe
    assert psnr(call(pipe, generator=None), call(pipe, generator=None)) > SAME
    assert pipe.unet.dtype == torch.float64
    pipe.to("cpu", torch.float32)
    assert np.array_equal(call(pipe), before)


def test_attention_slicing(tmp_path: Path) -> None:
    pipe = build(NAME, tmp_path, **SMALL)
    before = call(pipe)
    accelerate(pipe)
    call(pipe)
    pipe.enable_attention_slicing()
    assert psnr(call(pipe), before) > SAME
    assert counted(pipe.unet, lambda: call(pipe)) == 0
    pipe.disable_attention_slicing()
    assert psnr(call(pipe), before) > SAME


def test_hooks_of_accelerate(pipe: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="the package accelerate is missing")
    accelerate(pipe)
    before = call(pipe)
    hooks.add_hook_to_module(pipe.unet, hooks.ModelHook())
    assert np.array_equal(call(pipe), before)
    with pytest.raises(RuntimeError, match="replaced after it was accelerated"):
        restore(pipe)
    assert ours(pipe)  # nothing was undone halfway
    pipe.remove_all_hooks()
    restore(pipe)
    hooks.add_hook_to_module(pipe.unet, hooks.ModelHook())
    with pytest.warns(UserWarning, match=r"the unet of DDIMPipeline .*replaced.*take that away"):
        accelerate(pipe)
    assert "its forward was replaced already" in explain(pipe)
    assert psnr(call(pipe), before) > SAME
    restore(pipe)
    hooks.remove_hook_from_module(pipe.unet)
    left = vars(pipe.unet).get("forward")  # the class's own, bound
    accelerate(pipe)
    call(pipe)
    assert counted(pipe.unet, lambda: call(pipe)) == 0
    restore(pipe)
    assert vars(pipe.unet).get("forward") == left


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_unet_is_left_alone(in_place: bool, pipe: Any) -> None:
    if in_place:
        pipe.unet.compile()
    else:
        pipe.unet = torch.compile(pipe.unet)
    with pytest.warns(UserWarning, match=r"the unet .* left alone.*accelerate the model without"):
        accelerate(pipe)
    assert "was given to torch.compile" in explain(pipe)
    assert ours(pipe)
    restore(pipe)


def test_a_unet_of_another_library_is_left_alone(pipe: Any) -> None:
    class Another(torch.nn.Module):
        dtype, config = torch.float32, pipe.unet.config

        def forward(self, x: Any, t: Any) -> Any:
            return pipe.unet(x, t)

    pipe.unet = Another()
    with pytest.warns(UserWarning, match="Another is no model of diffusers.*stepfuse.optimize"):
        accelerate(pipe)
    restore(pipe)


def test_an_object_around_it_is_refused_with_what_would_help(pipe: Any) -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.inner, self.steps = pipe, 4

    with pytest.raises(TypeError, match=r"Wrapper; .*; accelerate\(obj.inner\) would do"):
        sf.accelerate(Wrapper())


def test_explain_names_what_was_done(pipe: Any) -> None:
    accelerate(pipe)
    assert "nothing compiled yet" in explain(pipe)
    call(pipe)
    assert "DDIMScheduler by denoise_step" in explain(pipe)
    assert "fuse_group_norm_silu" in explain(pipe)
