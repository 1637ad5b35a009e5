"""The U-Net against diffusers' UNet2DModel, its presets, its errors, and export."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stepfuse.bench.diffusers_twin import diffusers_twin
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.networks.unet_blocks import ResidualBlock, SelfAttention, timestep_embedding

SMALL = UNetConfig(
    in_channels=3,
    base_channels=16,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    norm_groups=4,
    num_classes=5,
)


def randomised(config: UNetConfig, seed: int = 0) -> UNet:
    """A network without the zeros of its initialisation, which would hide mistakes."""
    torch.manual_seed(seed)
    model = UNet(config)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.eval().requires_grad_(False)


def parameter_count(config: UNetConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())


DDPM = UNetConfig(
    base_channels=32,
    channel_multipliers=(1, 2, 2),
    attention_factors=(2,),
    norm_groups=8,
    asymmetric_downsample=True,
    num_classes=7,
)
ADM = UNetConfig(
    base_channels=48,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    attention_factors=(2,),
    head_channels=16,
    norm_groups=16,
    norm_eps=1e-5,
    scale_shift=True,
    updown="resblock",
    embedding_order="cos_sin",
    num_classes=4,
    learned_variance=True,
)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (DDPM, (16, 16)),
        (DDPM, (8, 20)),
        (dataclasses.replace(DDPM, num_classes=None, asymmetric_downsample=False), (12, 4)),
        (dataclasses.replace(DDPM, base_channels=24, in_channels=1, norm_groups=3), (16, 12)),
        (dataclasses.replace(DDPM, attention_factors=(1, 2, 4), head_channels=8), (8, 8)),
        (ADM, (16, 16)),
        (ADM, (6, 10)),
        (dataclasses.replace(ADM, attention_factors=(), num_classes=None), (8, 12)),
        (dataclasses.replace(ADM, updown="conv", in_channels=5), (4, 18)),
        (UNetConfig.digits(), (32, 32)),
    ],
)
def test_equals_diffusers_with_the_same_weights(config: UNetConfig, size: tuple[int, int]) -> None:
    model = randomised(config)
    twin = diffusers_twin(model)
    x = torch.randn(3, config.in_channels, *size)
    t = torch.tensor([0, 17, 999])
    if config.num_classes is None:
        ours, theirs = model(x, t), twin(x, t).sample
    else:
        labels = torch.tensor([0, config.num_classes - 1, config.num_classes])
        ours, theirs = model(x, t, labels), twin(x, t, labels).sample
    assert ours.shape == (3, config.out_channels, *size)
    # float32 with another order of summation; outputs are of order 1.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_ddpm_cifar10_has_the_papers_number_of_parameters() -> None:
    """35.7 million (Ho et al. 2020, section 4)."""
    assert parameter_count(UNetConfig.ddpm_cifar10()) == 35_746_307


def test_adm64_has_the_papers_number_of_parameters() -> None:
    """296 million (Dhariwal and Nichol 2021, table 12), and the row of the null class."""
    assert round(parameter_count(UNetConfig.adm64()) / 1e6) == 296


def test_digits_has_about_a_million_parameters() -> None:
    assert parameter_count(UNetConfig.digits()) == 1_192_641


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin"])
def test_timestep_embedding_is_the_formula(order: Any) -> None:
    t, channels = torch.tensor([0.0, 1.0, 250.5, 999.0]), 10
    half = channels // 2
    divisor = half - 1 if order == "sin_cos" else half
    for n, value in enumerate(t.tolist()):
        angles = [value * 10000 ** (-k / divisor) for k in range(half)]
        sines, cosines = torch.tensor(angles).sin(), torch.tensor(angles).cos()
        parts = [sines, cosines] if order == "sin_cos" else [cosines, sines]
        # float32 angles up to 999 carry an error of 6e-5.
        torch.testing.assert_close(
            timestep_embedding(t, channels, order)[n], torch.cat(parts), rtol=0, atol=1e-4
        )


def test_a_new_network_predicts_zero_and_its_blocks_are_their_shortcuts() -> None:
    model = UNet(SMALL)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 4])
    assert torch.equal(model(x, t), torch.zeros_like(x))
    h = torch.randn(2, 16, 8, 8)
    block, attention = model.down[0].block, model.middle[0].attention
    assert torch.equal(block(h, torch.randn(2, 64)), h)
    wide = torch.randn(2, 32, 4, 4)
    assert torch.equal(attention(wide), wide)


def test_residual_rescale_divides_each_sum_by_sqrt_two() -> None:
    options: dict[str, Any] = {"groups": 4, "eps": 1e-5, "dropout": 0.0, "scale_shift": False}
    torch.manual_seed(0)
    plain = ResidualBlock(8, 8, 16, residual_rescale=False, **options)
    scaled = ResidualBlock(8, 8, 16, residual_rescale=True, **options)
    scaled.load_state_dict(plain.state_dict())
    x, embedding = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    torch.testing.assert_close(scaled(x, embedding) * 2**0.5, plain(x, embedding))
    attention = SelfAttention(8, heads=1, groups=4, eps=1e-5, residual_rescale=True)
    torch.testing.assert_close(attention(x) * 2**0.5, x)


def test_no_labels_means_the_null_class() -> None:
    model = randomised(SMALL)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    null = torch.full((2,), SMALL.num_classes or 0)
    torch.testing.assert_close(model(x, t), model(x, t, null))
    assert not torch.allclose(model(x, t), model(x, t, torch.tensor([0, 1])), atol=1e-3)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = randomised(ADM)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    labels = torch.tensor([0, 1, 2, 4])
    together = model(x, t, labels)
    alone = torch.cat([model(x[n : n + 1], t[n : n + 1], labels[n : n + 1]) for n in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = randomised(dataclasses.replace(SMALL, dropout=0.5))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([10])
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.allclose(model(x, t), model(x, t), atol=1e-3)


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    channels=st.integers(1, 5),
    batch=st.integers(1, 3),
    multipliers=st.sampled_from([(1,), (1, 2), (2, 1, 3)]),
    scale_shift=st.booleans(),
    updown=st.sampled_from(["conv", "resblock"]),
    learned_variance=st.booleans(),
)
def test_any_size_divisible_by_the_down_sampling(
    height: int, width: int, channels: int, batch: int, multipliers: tuple[int, ...], **options: Any
) -> None:
    config = UNetConfig(
        in_channels=channels,
        base_channels=8,
        channel_multipliers=multipliers,
        blocks_per_level=1,
        attention_factors=(1,),
        norm_groups=2,
        **options,
    )
    model = randomised(config)
    size = (height * config.size_divisor, width * config.size_divisor)
    y = model(torch.randn(batch, channels, *size), torch.arange(batch))
    assert y.shape == (batch, config.out_channels, *size)
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_in_half_precision(dtype: torch.dtype) -> None:
    model = randomised(SMALL)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 800])
    expected = model(x, t)
    got = model.to(dtype)(x.to(dtype), t)
    assert got.dtype is dtype
    # Eight bits of mantissa (bfloat16) through some twenty layers.
    assert float((got.float() - expected).norm() / expected.norm()) < 3e-2


@pytest.mark.parametrize("config", [SMALL, ADM])
def test_exports_to_one_graph(config: UNetConfig) -> None:
    model = randomised(config)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 800])
    labels = torch.tensor([0, 1])
    program = torch.export.export(model, (x, t, labels))
    torch.testing.assert_close(program.module()(x, t, labels), model(x, t, labels))


def test_config_survives_a_dictionary() -> None:
    for config in (UNetConfig.ddpm_cifar10(), UNetConfig.adm64(), UNetConfig.digits()):
        values: dict[str, Any] = dataclasses.asdict(config)
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        assert UNetConfig.from_dict(lists) == config
    with pytest.raises(ValueError, match=r"unknown U-Net options.*'widht'"):
        UNetConfig.from_dict({"widht": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_groups": 7}, r"norm_groups is 7; accepted: a divisor"),
        ({"attention_factors": (16,)}, r"attention_factors is \(16,\); accepted: a subset of"),
        ({"num_heads": 3}, r"num_heads is 3; accepted: a divisor"),
        ({"num_heads": 2, "head_channels": 64}, r"num_heads is 2; accepted: 1 where"),
        ({"embedding_features": 7}, r"embedding_features is 7; accepted: an even number"),
        ({"head_channels": 48}, r"head_channels is 48; accepted: None or a divisor"),
        ({"base_channels": 33}, r"base_channels is 33; accepted: an even number"),
        ({"channel_multipliers": ()}, r"channel_multipliers is \(\); accepted"),
        ({"dropout": 1.0}, r"dropout is 1.0; accepted: in \[0, 1\)"),
        ({"updown": "pool"}, r"updown is 'pool'; accepted: 'conv' or 'resblock'"),
        ({"embedding_order": "sin"}, r"embedding_order is 'sin'; accepted"),
        ({"num_classes": 0}, r"num_classes is 0; accepted: None or at least 1"),
        ({"in_channels": 0}, r"in_channels is 0; accepted: at least 1"),
    ],
)
def test_a_config_that_cannot_be_built_says_so(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**options)


@pytest.mark.parametrize(
    ("x", "t", "labels", "message"),
    [
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(2),
            None,
            r"\(2, 1, 8, 8\); accepted: \[N, 3, H, W\]",
        ),
        (torch.zeros(3, 8, 8), torch.zeros(3), None, r"\(3, 8, 8\); accepted: \[N, 3, H, W\]"),
        (torch.zeros(2, 3, 9, 8), torch.zeros(2), None, r"\(9, 8\); accepted: .* divisible by 2"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(1), None, r"t has shape \(1,\); accepted: \[2\]"),
        (torch.zeros(2, 3, 8, 8), torch.tensor(3), None, r"t has shape \(\); accepted: \[2\]"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.tensor([1]), r"labels have shape \(1,\)"),
    ],
)
def test_wrong_shapes_say_so(x: Tensor, t: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(SMALL)(x, t, labels)


def test_labels_are_checked_on_request() -> None:
    model = UNet(SMALL)
    model.check_labels(torch.tensor([0, 4, 5]))
    with pytest.raises(ValueError, match=r"label 6 is out of range; accepted: 0..4, or 5"):
        model.check_labels(torch.tensor([1, 6]))
    with pytest.raises(ValueError, match="label -1"):
        model.check_labels(torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        model.check_labels(torch.tensor([1.0]))
    unconditional = UNet(dataclasses.replace(SMALL, num_classes=None))
    with pytest.raises(ValueError, match="no classes"):
        unconditional.check_labels(torch.tensor([1]))
    with pytest.raises(ValueError, match="no classes"):
        unconditional(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([1]))
