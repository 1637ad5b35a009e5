"""Class labels that a network has not are refused before the first step."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.sampling.conditioned import GRAPHS, SHAPE, build

import stepfuse as sf
from stepfuse.engine.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    in_channels=1,
    base_channels=8,
    channel_multipliers=(1,),
    blocks_per_level=1,
    attention_factors=(),
    norm_groups=4,
    num_classes=5,
)
NO_LABELS: list[tuple[Any, str]] = [
    ([1, 2, 6], r"labels: label 6 is out of range; accepted: 0\.\.4, or 5 for no class"),
    (torch.tensor([-1, 0, 0]), r"labels: label -1 is out of range; accepted: 0\.\.4"),
    (np.array([0, 1, 9]), "labels: label 9 is out of range"),
    ([0.0, 1.0, 2.0], r"labels have dtype torch\.float32; accepted: torch\.int64"),
    ([True, False, True], r"labels have dtype torch\.bool; accepted: torch\.int64"),
    (torch.tensor([0, 1, 2], dtype=torch.uint8), r"labels have dtype torch\.uint8"),
    ((0, 1, 2), "labels must be a tensor.*got tuple"),
    (3, "labels must be a tensor.*got int"),
    ("three", "labels must be a tensor.*got str"),
    ([1], r"condition 'labels' must have one entry per sample \(3\); got shape \(1,\)"),
]


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("labels", "message"), NO_LABELS, ids=lambda v: str(v)[:20])
def test_labels_a_network_has_not_are_refused_before_the_steps(
    labels: Any, message: str, optimize: bool
) -> None:
    sampler = build(UNet(CONFIG).eval(), optimize=optimize)
    for call in (sampler.sample, sampler.iterate):
        with pytest.raises((ValueError, TypeError), match=message):
            call(SHAPE, condition={"labels": labels})
    assert sampler.stats()["programs"] == 0


@GRAPHS
def test_labels_are_checked_at_every_call(graph: str | None) -> None:
    sampler = build(UNet(CONFIG).eval(), graph=graph)
    image = sampler.sample(SHAPE, condition={"labels": [0, 4, 5]})
    with pytest.raises(ValueError, match="label 6 is out of range"):
        sampler.sample(SHAPE, condition={"labels": [0, 4, 6]})
    again = sampler.sample(SHAPE, condition={"labels": torch.tensor([0, 4, 5])})
    assert torch.equal(again, image)


def test_unconditional_labels_are_checked_too() -> None:
    guidance = sf.CFG(2.0, unconditional={"labels": 6})
    sampler = build(UNet(CONFIG).eval(), guidance=guidance)
    with pytest.raises(ValueError, match="label 6 is out of range"):
        sampler.sample(SHAPE, condition={"labels": [0, 1, 2]})


def test_unconditional_labels_may_be_a_number() -> None:
    net = UNet(CONFIG).eval()
    images = [
        build(net, guidance=sf.CFG(2.0, unconditional={"labels": null}, batched=batched)).sample(
            SHAPE, condition={"labels": [0, 1, 2]}
        )
        for null, batched in ((None, False), (5, False), ([5], False), (torch.tensor(5), True))
    ]
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=0, atol=1e-5)


def test_a_network_says_so_itself_where_it_is_called_directly() -> None:
    net, t = UNet(CONFIG).eval(), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="label 6 is out of range"):
        net(torch.zeros(1, 1, 4, 4), t, torch.tensor([6]))
    with pytest.raises(TypeError, match="labels must be a tensor or None; got list"):
        net(torch.zeros(1, 1, 4, 4), t, [6])


def test_the_embedded_checkpoint() -> None:
    digits = sf.load("digits")
    sampler = sf.Sampler(digits.model, digits.schedule, steps=2)
    shape = (1, *digits.sample_shape)
    with pytest.raises(ValueError, match=re.escape("label 11 is out of range; accepted: 0..9")):
        sampler.sample(shape, condition={"labels": [11]})
    image = sampler.sample(shape, condition={"labels": [1]})
    assert torch.equal(image, sampler.sample(shape, condition={"labels": torch.tensor([1])}))
