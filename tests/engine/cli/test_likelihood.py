"""`stepfuse likelihood` as a user meets it: what it says, and what it writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.cli.cli_case import SIDE

import stepfuse as sf
from stepfuse.engine.cli import run

pytestmark = [
    pytest.mark.usefixtures("empty_folder"),
    pytest.mark.filterwarnings("ignore:.*bits/dim over"),
]
DATA = "test.npz"


def images(count: int = 7, channels: int = 1, **more: Any) -> Any:
    """Write `DATA` with labels 0, 1, 2, 0, ...; its images."""
    shape = (count, SIDE, SIDE, channels)
    levels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(DATA, images=levels, **({"labels": np.arange(count) % 3} | more))
    return levels


def likelihood(model: str, *options: str) -> int:
    """In this process, quickly: its exit status."""
    return run(["likelihood", DATA, "-m", model, "--optimize", "off", *options])


def test_every_number_is_that_of_the_function(tiny: str, capsys: Any) -> None:
    """Images evenly spaced over the data, with their own labels and numbers."""
    levels = images()
    assert likelihood(tiny, "-n", "3", "--steps", "10", "--seed", "4", "-o", "b.json") == 0
    said = capsys.readouterr().out
    found = json.loads(Path("b.json").read_text())
    numbers = torch.tensor([0, 2, 4])
    checkpoint = sf.load(tiny)
    bound = sf.bits_per_dim(
        checkpoint.model,
        checkpoint.schedule,
        torch.tensor(levels)[numbers].movedim(-1, 1),
        condition={"labels": numbers % 3},
        timesteps=sf.spaced_timesteps(100, 10),
        first_index=numbers,
        seed=4,
    )
    assert found["totals"] == pytest.approx(bound.total.tolist(), rel=1e-6)
    assert found["terms"] == pytest.approx(bound.terms.mean(0).tolist(), rel=1e-6)
    assert found["bits_per_dim"] == pytest.approx(float(bound.total.mean()), rel=1e-6)
    rate, rmse = bound.rate_distortion()
    assert found["rate"] == pytest.approx(rate.tolist(), rel=1e-6)
    assert found["rmse"] == pytest.approx(rmse.tolist(), rel=1e-6)
    assert len(found["rate"]) == 11
    assert found["known"][-1] == {
        "part": 1.0, "timestep": None, "rate": found["rate"][-1], "rmse": 0,
    }  # fmt: skip
    assert found["settings"]["variance"] == "fixed_large"
    lines = said.splitlines()
    assert lines[0].startswith(f"{found['bits_per_dim']:.4f} bits/dim +- ")
    assert lines[0].endswith(", 3 images, 10 timesteps, fixed_large")
    assert re.fullmatch(r"b\.json: 30 evaluations in [\d.]+ s: [\d.e+]+ a second", lines[-1])


def test_a_picture(tiny: str) -> None:
    images()
    assert likelihood(tiny, "--steps", "5", "-o", "curve.png") == 0
    assert os.listdir() == [DATA, "curve.png"] or sorted(os.listdir()) == ["curve.png", DATA]
    with Image.open("curve.png") as picture:
        pixels = np.asarray(picture)
        settings = json.loads(picture.text["stepfuse"])  # type: ignore[attr-defined]
    assert (settings["n"], settings["steps"]) == (7, 5)
    # two charts of 460 by 300 points, and under them five rows of images of 64 pixels
    assert pixels.shape[1:] == (2 * 2 * 460, 3)
    assert pixels.shape[0] == 2 * 300 + 5 * (8 * SIDE + 4)
    assert len(np.unique(pixels[:600].reshape(-1, 3), axis=0)) > 20  # lines and letters


def test_a_page_of_its_own(rgb: str) -> None:
    images(4, 3)
    assert likelihood(rgb, "--steps", "5", "-o", "page.html", "--cdf", "tanh") == 0
    text = Path("page.html").read_text()
    assert "learned_range" in text  # the model's own variance
    assert 'src="data:image/png;base64,' in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 2
    for chart in charts:
        lines = ElementTree.fromstring(chart).findall("{http://www.w3.org/2000/svg}polyline")
        assert max(len(line.attrib["points"].split()) for line in lines) >= 5


def test_only_said(tiny: str, capsys: Any) -> None:
    images(1)
    assert likelihood(tiny, "--steps", "3", "--labels", "none") == 0
    assert os.listdir() == [DATA]
    said = capsys.readouterr().out
    assert "1 image, 3 timesteps" in said
    assert "+-" not in said


def test_folders_of_classes_by_name(tiny: str) -> None:
    """The classes of the data are those of the model by name, whatever their order."""
    levels = images(2)[..., 0]
    for name, level in zip(("square", "circle"), levels, strict=True):
        Path("data", name).mkdir(parents=True)
        Image.fromarray(level).save(Path("data", name, "0.png"))
    assert run(["likelihood", "data", "-m", tiny, "--optimize", "off", "-o", "a.json"]) == 0
    np.savez(DATA, images=levels[::-1], labels=[0, 1])  # circle, square
    assert likelihood(tiny, "-o", "b.json") == 0
    folder, file = (json.loads(Path(n).read_text())["totals"] for n in ("a.json", "b.json"))
    assert folder == pytest.approx(file, rel=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "are 4x4 with 1 channel; accepted by model"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "are 8x8 with 3 channels; accepted by"),
        ({"images": np.zeros((2, 8, 8), np.uint16)}, "have 16 bits; accepted: 8"),
        ({"images": np.zeros((2, 8, 8), np.uint8)}, "has no labels, which model"),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": [0, 3]},
            "a class of test.npz must be one of circle, square, 7 or none; got '3'",
        ),
    ],
)
def test_data_that_do_not_fit(tiny: str, arrays: Any, message: str, capsys: Any) -> None:
    if "labels" in arrays:
        arrays = {**arrays, "class_names": ["0", "1", "2", "3"]}
    np.savez(DATA, **arrays)
    assert likelihood(tiny, "-o", "x.png") == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert os.listdir() == [DATA]


def test_a_spacing_is_looked_at_without_steps_too(tiny: str, capsys: Any) -> None:
    images()
    assert likelihood(tiny, "--spacing", "odd") == 2
    assert "--spacing must be one of leading, trailing" in capsys.readouterr().err


def test_far_too_many_bits_are_a_note(tiny: str, capsys: Any) -> None:
    images()
    assert likelihood(tiny, "--steps", "4", "--variance", "fixed_small") == 0
    assert re.search(r"^note: .* will give a tighter bound$", capsys.readouterr().out, re.M)
