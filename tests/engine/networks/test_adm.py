"""OpenAI's checkpoints: the same function from the same weights, and errors that say which."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.engine.adapters.guided_diffusion_case import diffusion
from tests.engine.networks.adm_oracle import ADM
from torch import Tensor

import stepfuse as sf
from stepfuse import Sampler, Schedule
from stepfuse.engine.networks import adm
from stepfuse.engine.networks.adm import PRESETS, ADMConfig, adm_config, load_adm
from stepfuse.engine.networks.unet import UNet

NEAR = 1e-5  # float32: another order of the same sums

VARIANTS: dict[str, dict[str, Any]] = {
    "adm": {"classes": 7},
    "new order": {"new_order": True},
    "several heads": {"head_channels": None, "heads": 4, "factors": (1, 2)},
    "improved": {
        "updown": False,
        "head_channels": None,
        "heads": 2,
        "learned": False,
        "scale_shift": False,
    },
    "no levels": {"multipliers": (1,), "blocks": 2, "factors": (1,)},
    "deep": {"multipliers": (1, 1, 2), "blocks": 2, "factors": (4,), "channels": 1},
    "narrow first": {"width": 64, "multipliers": (0.5, 1, 1.5), "factors": (4,)},
}


def given(variant: dict[str, Any]) -> dict[str, Any]:
    """What the weights do not say."""
    heads = variant.get("head_channels", 16)
    return {
        "head_channels": heads,
        "num_heads": None if heads else variant["heads"],
        "new_attention_order": variant.get("new_order", False),
    }


def inputs(theirs: ADM, size: tuple[int, int] = (8, 12)) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(1)
    y = None if theirs.classes is None else torch.tensor([0, theirs.classes - 1])
    return torch.randn(2, theirs.channels, *size), torch.tensor([3, 977]), y


@pytest.mark.parametrize("name", VARIANTS)
def test_same_function(name: str) -> None:
    theirs = ADM(**VARIANTS[name])
    ours = load_adm(theirs.weights, **given(VARIANTS[name]))
    x, t, y = inputs(theirs)
    expected = theirs(x, t, y)
    torch.testing.assert_close(ours(x, t, y), expected, rtol=NEAR, atol=NEAR)
    assert expected.shape[1] == theirs.channels * (2 if theirs.learned else 1)
    assert expected.std() > 0.1
    assert not ours.training
    assert not any(weight.requires_grad for weight in ours.parameters())


def test_the_order_of_qkv_matters() -> None:
    theirs = ADM()
    x, t, _ = inputs(theirs)
    wrong = load_adm(theirs.weights, head_channels=16, new_attention_order=True)
    assert (wrong(x, t) - theirs(x, t)).abs().max() > 0.01
    fewer = load_adm(theirs.weights, head_channels=32)
    assert (fewer(x, t) - theirs(x, t)).abs().max() > 0.01


def test_null_class_adds_nothing() -> None:
    theirs = ADM(classes=3)
    ours = load_adm(theirs.weights, head_channels=16)
    x, t, _ = inputs(theirs)
    torch.testing.assert_close(ours(x, t), theirs(x, t, None), rtol=NEAR, atol=NEAR)
    assert ours.config.num_classes == 3


def test_weights_are_copies() -> None:
    theirs = ADM()
    ours = load_adm(theirs.weights, head_channels=16)
    before = ours.conv_in.weight.clone()
    theirs.weights["input_blocks.0.0.weight"].zero_()
    assert torch.equal(ours.conv_in.weight, before)
    half = load_adm(theirs.weights, head_channels=16, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_files(tmp_path: Path) -> None:
    theirs = ADM(classes=2)
    x, t, y = inputs(theirs)
    torch.save(theirs.weights, tmp_path / "model.pt")
    save_file(theirs.weights, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        ours = load_adm(tmp_path / name, head_channels=16)
        torch.testing.assert_close(ours(x, t, y), theirs(x, t, y), rtol=NEAR, atol=NEAR)
        whole = (tmp_path / name).read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 7):
            cut = tmp_path / f"cut-{name}"
            cut.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf"cut-{name} is truncated or no file of weights"):
                load_adm(cut, head_channels=16)
    with pytest.raises(ValueError, match=r"nowhere\.pt is not there"):
        load_adm(tmp_path / "nowhere.pt", head_channels=16)


class Malicious:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code was run')",)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    """Nothing in a file is run."""
    torch.save({"a": Malicious()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt is truncated or no file of weights"):
        load_adm(tmp_path / "code.pt", head_channels=16)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list; accepted: a state dict"):
        load_adm(tmp_path / "list.pt", head_channels=16)
    torch.save({"model": {"out.0.weight": torch.zeros(1)}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="'model' is a dict; accepted: a state dict of tensors"):
        load_adm(tmp_path / "nested.pt", head_channels=16)


@pytest.mark.parametrize("config", [None, "flags"])
@pytest.mark.parametrize(
    "name",
    [
        "time_embed.0.weight",
        "input_blocks.1.0.in_layers.0.bias",
        "middle_block.1.qkv.weight",
        "output_blocks.1.2.out_layers.3.weight",
        "output_blocks.3.0.skip_connection.weight",
        "out.2.bias",
    ],
)
def test_a_missing_weight_is_named(name: str, config: str | None) -> None:
    theirs = ADM()
    del theirs.weights[name]
    options = {"config": SMALL} if config else {"head_channels": 16}
    with pytest.raises(ValueError, match=name):
        load_adm(theirs.weights, **options)


SMALL = {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "attention_resolutions": "8",
    "resblock_updown": True,
    "learn_sigma": True,
}


def test_left_over_and_misshaped_weights_are_named() -> None:
    theirs = ADM()
    extra = {**theirs.weights, "output_blocks.0.0.extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"has not: output_blocks\.0\.0\.extra\.weight"):
        load_adm(extra, SMALL)
    wrong = {**theirs.weights, "middle_block.0.in_layers.2.bias": torch.zeros(63)}
    with pytest.raises(ValueError, match=r"middle_block\.0\.in_layers\.2\.bias has shape \(63,\)"):
        load_adm(wrong, head_channels=16)
    labels = {**ADM(classes=3).weights, "label_emb.weight": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=r"label_emb\.weight has shape \(3, 5\)"):
        load_adm(labels, head_channels=16)
    with pytest.raises(ValueError, match=r"has not: label_emb\.weight"):
        load_adm(ADM(classes=3).weights, SMALL)
    with pytest.raises(ValueError, match=r"lacks .*label_emb\.weight"):
        load_adm(theirs.weights, {**SMALL, "class_cond": True})
    with pytest.raises(ValueError, match="0 output_blocks"):
        load_adm({"weight": torch.zeros(1)}, head_channels=16)
    super_resolution = {**theirs.weights, "input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}
    with pytest.raises(ValueError, match="Super-resolution networks"):
        load_adm(super_resolution, head_channels=16)


def test_flags() -> None:
    """The flags of the command line describe the network that the weights describe."""
    theirs = ADM(classes=5)
    text = " ".join(f"--{name} {value}" for name, value in SMALL.items())
    unet = load_adm(theirs.weights, f"{text} --class_cond True --noise_schedule cosine")
    assert unet.config == load_adm(theirs.weights, head_channels=16).config
    assert load_adm(theirs.weights, ADMConfig(unet.config)).config == unet.config
    x, t, y = inputs(theirs)
    torch.testing.assert_close(unet(x, t, y), theirs(x, t, y), rtol=NEAR, atol=NEAR)
    both = adm_config("--image_size 32 --num_heads 8")
    assert both.unet.num_heads == 8
    assert both.unet.attention_factors == (2, 4)
    assert both.unet.scale_shift
    assert both.unet.updown == "conv"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("1024x1024_diffusion", "unknown preset '1024x1024_diffusion'; accepted: 64x64_diffusion"),
        ("--image_size", "pairs of --name value"),
        ("--image_seize 64", "unknown flag 'image_seize'; accepted: attention_resolutions"),
        ("--image_size 96", "image_size is 96; accepted"),
        ("--num_channels wide", "num_channels is 'wide'; accepted: a int"),
        ("--learn_sigma maybe", "learn_sigma is 'maybe'; accepted: a bool"),
        ("--channel_mult 1,x", "channel_mult is '1,x'"),
        ("--channel_mult 2,3", r"levels have \[256, 384\]"),
        ("--num_heads_upsample 2", "num_heads_upsample is 2"),
    ],
)
def test_flags_that_cannot_be_meant(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adm_config(flags)


def test_heads_must_be_given() -> None:
    weights = ADM().weights
    for options in ({}, {"head_channels": 16, "num_heads": 2}):
        with pytest.raises(ValueError, match="do not say how many heads"):
            load_adm(weights, **options)
    with pytest.raises(ValueError, match="give it alone"):
        load_adm(weights, SMALL, head_channels=16)


# weights of OpenAI's class with these flags; 296M, 422M, 554M, 552M and 559M in the paper
SIZES = {
    "64x64_diffusion": 295_904_454,
    "128x128_diffusion": 421_529_606,
    "256x256_diffusion": 553_838_086,
    "256x256_diffusion_uncond": 552_814_086,
    "512x512_diffusion": 558_997_638,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    """As large as theirs but for the null class, and every weight has a place."""
    config = adm_config(preset).unet
    with torch.device("meta"):
        unet = UNet(config)
    count = sum(math.prod(weight.shape) for weight in unet.parameters())
    if unet.class_embedding is not None:
        count -= unet.class_embedding.weight.shape[1]
    assert count == SIZES.get(preset, SIZES["256x256_diffusion_uncond"])
    places = {ours for _, ours in adm.pairs(config)}
    assert set(unet.state_dict()) <= places | {"class_embedding.weight"}


def test_sampling() -> None:
    """What comes out goes into a sampler."""
    unet = load_adm(ADM(classes=4).weights, head_channels=16)
    sampler = Sampler(
        unet, Schedule.linear(), method="ddpm", steps=3, variance_type="learned_range"
    )
    images = sampler.sample((1, 3, 8, 8), seed=0, condition={"labels": torch.tensor([2])})
    assert images.shape == (1, 3, 8, 8)
    assert bool(images.isfinite().all())


def test_guided_diffusion() -> None:
    """Their diffusion around their network, and both of ours: the same images from one seed."""
    theirs, d = ADM(classes=4), diffusion("oracle", "EPSILON", "LEARNED_RANGE")
    y = torch.tensor([2, 0])
    torch.manual_seed(5)
    expected = d.ddim_sample_loop(
        theirs, (2, 3, 8, 8), device="cpu", model_kwargs={"y": y}, eta=0.5
    )
    unet = load_adm(theirs.weights, head_channels=16)
    torch.manual_seed(5)
    ours = sf.accelerate(d).ddim_sample_loop(
        unet, (2, 3, 8, 8), model_kwargs={"labels": y}, eta=0.5
    )
    # 12 steps of a network of random weights, where x0 is divided by sqrt(abar) = 0.04 at first
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
