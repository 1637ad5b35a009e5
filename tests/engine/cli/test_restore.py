"""`stepfuse restore` as a user meets it: what it says, and what it writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.cli.cli_case import SIDE

import stepfuse as sf
from stepfuse.engine.cli import run

pytestmark = pytest.mark.usefixtures("empty_folder")
TASKS = ("inpaint", "outpaint", "sr", "blur", "tomography")


def restore(model: str, *options: str) -> int:
    """In this process, quickly: its exit status."""
    return run(["restore", "-m", model, "--steps", "3", *options])


def levels(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape or (SIDE, SIDE), dtype=np.uint8)


def picture(pixels: Any, name: str = "in.png") -> str:
    Image.fromarray(pixels).save(name)
    return name


def opened(name: str) -> Any:
    with Image.open(name) as read:
        return np.asarray(read)


@pytest.mark.parametrize("task", TASKS)
def test_a_demo_of_every_task(tiny: str, task: str, capsys: Any) -> None:
    assert restore(tiny, "--task", task, "--demo", "--images", "3", "-o", "strip.png") == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"PSNR, dB: pseudo-inverse -?[\d.]+, one sample -?[\d.]+", said[0])
    assert re.fullmatch(
        r"strip.png: 3 samples by pigdm, 3 steps, in [\d.]+ s: .* a second", said[1]
    )
    assert os.listdir() == ["strip.png"]
    with Image.open("strip.png") as read:
        settings = json.loads(read.text["stepfuse"])  # type: ignore[attr-defined]
    assert (settings["task"], settings["images"], settings["demo"]) == (task, 3, True)
    # four columns of three images, enlarged eight times, under headings
    width, height = 8 * SIDE + 4, 3 * (8 * SIDE + 2) + 2 + 2 * 22
    assert opened("strip.png").shape == (height, 4 * width, 3)


def test_several_samples_their_mean_and_deviation(tiny: str, capsys: Any) -> None:
    line = ("--task", "blur", "--demo", "--images", "2", "-n", "3", "--std", "std.png")
    assert restore(tiny, *line, "-o", "strip.png") == 0
    said = capsys.readouterr().out
    assert "mean of 3 samples" in said
    assert "std.png: the standard deviation of the samples" in said
    assert opened("strip.png").shape[1] == 7 * (8 * SIDE + 4)
    assert opened("std.png").max() > 0


def sampled(model: str, guidance: Any, y: Any, count: int = 1, **more: Any) -> Any:
    """The same in Python, as uint8 [count, H, W]."""
    checkpoint = sf.load(model)
    sampler = checkpoint.sampler(steps=3, eta=1.0, guidance=guidance)
    labels = {"labels": torch.full((count,), checkpoint.num_classes)}
    x = sampler.sample(
        (count, *checkpoint.sample_shape),
        condition=labels | more,
        measurement=y.repeat_interleave(count, 0),
    )
    return (checkpoint.decode(x) * 255 + 0.5).floor().to(torch.uint8)[:, 0].numpy()


def as_values(pixels: Any) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1)[None, None]


def test_a_small_picture_is_that_of_the_function(tiny: str) -> None:
    small = levels(SIDE // 2, SIDE // 2)
    line = (picture(small), "--task", "sr", "--factor", "2", "--noise", "0.1", "-o", "out.png")
    assert restore(tiny, *line) == 0
    guidance = sf.PiGDM(sf.inverse.Downsample(2), 0.1, 0.6)
    assert np.array_equal(opened("out.png"), sampled(tiny, guidance, as_values(small))[0])


def test_a_hole(tiny: str) -> None:
    """The mask is white where the picture is missing; what is in the picture there is not read."""
    seen = levels()
    hole = np.zeros((SIDE, SIDE), np.uint8)
    hole[2:5, 3:] = 255
    picture(hole, "hole.png")
    line = ("--task", "inpaint", "--mask", "hole.png", "--noise", "0.01", "-o", "out.png")
    assert restore(tiny, picture(seen), *line) == 0
    mask = torch.from_numpy(hole == 0).float()
    guidance = sf.PiGDM(sf.inverse.Mask(mask), 0.01, 0.6)
    expected = sampled(tiny, guidance, as_values(seen) * mask)[0]
    assert np.array_equal(opened("out.png"), expected)
    first = opened("out.png")
    assert restore(tiny, picture(np.where(hole, 9, seen).astype(np.uint8)), *line) == 0
    assert np.array_equal(opened("out.png"), first)


def test_a_border_by_dps(tiny: str) -> None:
    inner = levels(SIDE - 4, SIDE - 4)
    line = ("--task", "outpaint", "--method", "dps", "--scale", "0.5", "-o", "out.png")
    assert restore(tiny, picture(inner), *line) == 0
    guidance = sf.DPS(sf.inverse.Outpaint(2), 0.5)
    assert np.array_equal(opened("out.png"), sampled(tiny, guidance, as_values(inner))[0])


def test_projections(tiny: str) -> None:
    """White is the sum of a white side, in the units of the unscaled operator."""
    density = np.zeros((SIDE, SIDE), np.float32)
    density[2:6, 3:5] = 1
    plain, scaled = sf.inverse.Radon(4), sf.inverse.Radon(4, normalize=True)
    sums = plain(torch.from_numpy(density)[None, None])[0, 0] / SIDE
    rows = (sums * 255).round().to(torch.uint8)
    line = ("--task", "tomography", "--angles", "4", "--noise", "0.02", "-o", "out.png")
    assert restore(tiny, picture(rows.numpy()), *line) == 0
    y = scaled(2 * torch.from_numpy(density)[None, None] - 1)
    expected = sampled(tiny, sf.PiGDM(scaled, 0.02, 0.6), y)[0]
    # 8 bits of the projections
    assert np.abs(opened("out.png").astype(int) - expected).mean() < 6


def test_a_label_and_guidance(tiny: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach the sampler: the class of every sample, and the mixture of two outputs."""
    asked: list[tuple[Any, list[int]]] = []
    sample = sf.Sampler.sample

    def watched(self: sf.Sampler, shape: Any, **named: Any) -> torch.Tensor:
        asked.append((self.guidance, named["condition"]["labels"].tolist()))
        return sample(self, shape, **named)

    monkeypatch.setattr(sf.Sampler, "sample", watched)
    line = (picture(levels()), "--task", "blur", "-n", "2", "-o", "out.png")
    assert restore(tiny, *line) == 0
    assert restore(tiny, *line, "--label", "square", "--guidance", "3") == 0
    (plain, null), (guided, labels) = asked
    assert (plain.cfg, null) == (None, [3, 3])  # the null class
    assert (guided.cfg, labels) == (sf.CFG(3.0, {"labels": None}), [1, 1])
    assert restore(tiny, *line, "--guidance", "3") == 2
    assert "needs a --label to be guided by" in capsys.readouterr().err


def test_colour(rgb: str) -> None:
    assert restore(rgb, picture(levels(SIDE, SIDE, 3)), "--task", "blur", "-n", "4") == 0
    assert opened("restored.png").shape[2] == 3


def test_a_picture_as_the_truth_of_a_demo(tiny: str, capsys: Any) -> None:
    assert restore(tiny, picture(levels()), "--task", "sr", "--demo", "-o", "strip.png") == 0
    assert "PSNR" in capsys.readouterr().out
    first = opened("strip.png")
    assert np.array_equal(first[46:54, 2:10, 0], np.full((8, 8), levels()[0, 0]))


def test_a_seed_gives_the_same_picture(tiny: str) -> None:
    line = ("--task", "blur", "--demo", "--images", "1", "-n", "2")
    made = []
    for seed, batch in (("1", "16"), ("1", "16"), ("2", "16")):
        assert restore(tiny, *line, "--seed", seed, "--batch-size", batch) == 0
        made.append(Path("restored.png").read_bytes())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["in.png", "--task", "sr"], "in.png is 8x8 with 1 channel; accepted here: 2x2 with 1"),
        (["in.png", "--task", "blur", "--sigma", "nan"], "sigma must be finite"),
        (["in.png", "--task", "inpaint"], "--task inpaint needs --mask"),
        (["--task", "blur"], "give a picture of what was measured, or --demo"),
        (["in.png", "--task", "blur", "--demo", "--images", "2"], "--images belongs to --demo and"),
        (["in.png", "--task", "blur", "--std", "s.png"], "--std needs several samples: -n 2"),
        (["in.png", "--task", "blur", "--weight", "paper", "--method", "dps"], "--weight belongs"),
    ],
)
def test_mistakes(tiny: str, options: list[str], message: str, capsys: Any) -> None:
    picture(levels())
    assert restore(tiny, *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert os.listdir() == ["in.png"]
