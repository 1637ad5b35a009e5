"""The capture lint: steps that a CUDA graph could hold pass, others fail with the line."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.replay.capture import CaptureRefused
from stepfuse.engine.sampling.lint import check_capturable, without_bindings

SCHEDULE = sf.Schedule.linear()
LABELS = {"labels": torch.tensor([1, 2])}


@pytest.mark.parametrize("preset", ["digits", "ddpm_cifar10", "adm64"])
def test_our_unets_pass(preset: str) -> None:
    config = getattr(UNetConfig, preset)()
    with torch.device("meta"):
        model = UNet(config)
    labels = LABELS if config.num_classes is not None else {}
    learned = (
        {"method": "ddpm", "variance_type": "learned_range"} if config.learned_variance else {}
    )
    sampler = sf.Sampler(on_cpu(model), SCHEDULE, **learned)
    check_capturable(sampler, (2, config.in_channels, 32, 32), labels)


def on_cpu(model: nn.Module) -> nn.Module:
    """The model with unfilled weights on the CPU: only shapes matter here."""
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_guided_steps_pass(method: str) -> None:
    model = UNet(UNetConfig.digits())

    def classifier(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x.flatten(1).sum(1)

    for guidance in (
        sf.CFG(2.0, {"labels": None}, rescale=0.5),
        sf.ClassifierGuidance(classifier, 1.0),
    ):
        sampler = sf.Sampler(model, SCHEDULE, method=method, guidance=guidance)
        check_capturable(sampler, (2, 1, 32, 32), LABELS)


def test_diffusers_unets_pass() -> None:
    shared = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    image = UNet2DModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **shared,
    )
    check_capturable(sf.Sampler(image, SCHEDULE), (2, 3, 16, 16))
    latent = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        **shared,
    )
    text = {"encoder_hidden_states": torch.randn(2, 7, 24)}
    check_capturable(sf.Sampler(latent, SCHEDULE), (2, 4, 16, 16), text)


KEPT: list[Tensor] = []


class Leaks(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        KEPT.append(x * 2)
        return x


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(4)  # not a buffer: stays behind when the model moves

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda x, t: x * t[0].item(), r"read on the host.*t\[0\]\.item\(\)"),
        (lambda x, t: x if t[0] > 5 else -x, r"read on the host.*t\[0\] > 5"),
        (lambda x, t: x * float(t.sum()), r"read on the host.*float\(t\.sum\(\)\)"),
        (lambda x, t: x * t.cpu().to(x.device)[0], r"read on the host.*t\.cpu\(\)"),
        (lambda x, t: x + x[x > 0].sum(), r"x\[x > 0\]"),
        (lambda x, t: x * torch.tensor(3.0), r"CPU operand.*torch\.tensor\(3\.0\)"),
        (lambda x, t: x + torch.ones(4).to(x.device), r"CPU operand.*torch\.ones\(4\)"),
        (Unregistered(), r"(same device|different devices).*test_lint\.py"),
        (Leaks(), r"outlives the step.*KEPT\.append"),
    ],
)
def test_what_a_graph_could_not_hold_fails_with_its_line(model: object, reason: str) -> None:
    KEPT.clear()
    with pytest.raises(CaptureRefused, match=reason):
        check_capturable(sf.Sampler(model, SCHEDULE), (2, 1, 4, 4))


def test_nothing_of_it_stays_behind() -> None:
    """A tensor class that once had an indexing method of its own counts as a sequence."""
    methods = dict(vars(Tensor))
    with without_bindings():
        assert vars(Tensor)["item"] is not methods.get("item")
    assert dict(vars(Tensor)) == methods
    assert torch.equal(torch.tensor([torch.tensor(2.0)]), torch.tensor([2.0]))
