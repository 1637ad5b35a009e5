"""The command line as a user meets it: what it writes and says.

Most commands run in this process, where a command takes milliseconds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.cli.cli_case import LABELS, SIDE, TINY, arrays, process, sample, save

import stepfuse as sf
from stepfuse.engine.cli import run
from stepfuse.engine.networks import checkpoint
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.training.data import load_images
from stepfuse.kernels.backends import resolve, why_not

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_a_grid_from_a_process_of_its_own(tiny: str) -> None:
    done = process("sample", "-m", tiny, "-n", "5", "--steps", "2", "--threads", "1", "-o", "a.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        r"a\.png: 5 images of 8x8, 2 steps, in [\d.]+ s: [\d.e+]+ images/s "
        r"\(\w+ on cpu, 1 thread\)\n",
        done.stdout,
    )
    assert os.listdir() == ["a.png"]
    with Image.open("a.png") as picture:
        # 3 columns and 2 rows of images enlarged 4 times, 2 pixels around each
        assert (picture.mode, picture.size) == (
            "L",
            (3 * (4 * SIDE + 2) + 2, 2 * (4 * SIDE + 2) + 2),
        )
        settings = json.loads(picture.text["stepfuse"])  # type: ignore[attr-defined]
    assert (settings["model"], settings["n"], settings["seed"]) == (tiny, 5, 0)


def test_an_array_has_labels_and_settings_and_can_be_trained_on(tiny: str) -> None:
    assert sample(tiny, "-n", "5", "--seed", "3", "-o", "a.npz") == 0
    read = arrays("a.npz")
    assert (read["images"].dtype, read["images"].shape) == (np.uint8, (5, SIDE, SIDE))
    assert read["labels"].tolist() == [0, 1, 2, 0, 1]
    assert json.loads(str(read["settings"]))["seed"] == 3
    data = load_images("a.npz")
    assert (len(data), data.class_names) == (5, LABELS)


def test_the_default_name_is_that_of_the_model(tiny: str) -> None:
    assert sample(tiny, "-n", "1") == 0
    assert os.listdir() == ["tiny.png"]


def test_an_image_has_its_number_in_whatever_call_and_batch_it_is_drawn(tiny: str) -> None:
    assert sample(tiny, "-n", "7", "-o", "all.npz") == 0
    assert sample(tiny, "-n", "7", "--batch-size", "3", "-o", "batches.npz") == 0
    assert sample(tiny, "-n", "3", "--first-index", "4", "-o", "last.npz") == 0
    assert sample(tiny, "-n", "7", "--seed", "1", "-o", "other.npz") == 0
    whole, batches, last = arrays("all.npz"), arrays("batches.npz"), arrays("last.npz")
    assert last["labels"].tolist() == whole["labels"].tolist()[4:] == [1, 2, 0]
    # the network's sums may be taken in another order in another batch
    assert np.abs(whole["images"].astype(int) - batches["images"]).max() <= 1
    assert np.abs(whole["images"][4:].astype(int) - last["images"]).max() <= 1
    assert np.abs(whole["images"].astype(int) - arrays("other.npz")["images"]).max() > 50


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (["--label", "square"], [1, 1, 1, 1]),
        (["-l", "2", "-l", "none"], [2, -1, 2, -1]),
        # a name comes before a number
        (["-l", "7"], [2, 2, 2, 2]),
        (["-l", "none"], [-1, -1, -1, -1]),
    ],
)
def test_labels_by_name_by_number_and_none(tiny: str, options: list[str], labels: Any) -> None:
    assert sample(tiny, "-n", "4", *options, "-o", "a.npz") == 0
    assert arrays("a.npz")["labels"].tolist() == labels


def test_the_sampler_gets_what_was_asked_for(
    tiny: str, rgb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    original = Sampler.__init__

    def spy(self: Sampler, *args: Any, **kwargs: Any) -> None:
        made.append((args, kwargs))
        original(self, *args, **kwargs)

    monkeypatch.setattr(Sampler, "__init__", spy)
    options = ["--eta", "0.5", "--spacing", "trailing", "--backend", "reference"]
    assert sample(tiny, "-n", "1", *options, "--guidance", "3") == 0
    assert run(["sample", "-m", rgb, "-n", "1", "--method", "ddpm", "--steps", "2,1"]) == 0
    first, second = made[0][1], made[1][1]
    assert {k: first[k] for k in ("method", "steps", "spacing", "eta", "backend")} == {
        "method": "ddim", "steps": 2, "spacing": "trailing", "eta": 0.5, "backend": "reference",
    }  # fmt: skip
    assert first["guidance"] == sf.CFG(3.0, unconditional={"labels": None})
    assert (second["method"], second["steps"], second["guidance"]) == ("ddpm", "2,1", None)
    assert second["variance_type"] == "learned_range"


@pytest.mark.parametrize(("dtype", "levels"), [("float32", 1), ("bfloat16", 16)])
def test_a_compiled_network_draws_the_same(tiny: str, dtype: str, levels: int) -> None:
    assert sample(tiny, "-n", "3", "-o", "plain.npz") == 0
    assert sample(tiny, "-n", "3", "-o", "fast.npz", "--optimize", dtype) == 0
    plain, fast = (arrays(f"{name}.npz")["images"].astype(int) for name in ("plain", "fast"))
    assert plain.std() > 0
    assert abs(plain - fast).max() <= levels, "of 256"


def test_a_folder_is_never_overwritten_unasked(tiny: str, capsys: Any) -> None:
    assert sample(tiny, "-n", "2", "--first-index", "5", "-o", "images") == 0
    assert sorted(os.listdir("images")) == ["000005.png", "000006.png"]
    with Image.open("images/000006.png") as picture:
        assert (picture.mode, picture.size) == ("L", (SIDE, SIDE))
        assert picture.text["label"] == "circle"  # type: ignore[attr-defined]
    capsys.readouterr()
    assert sample(tiny, "-n", "1", "-o", "images/") == 2
    assert re.fullmatch(
        r"error: folder \S+/images is not empty; accepted: a new or an empty one, or --force\n",
        capsys.readouterr().err,
    )
    assert sample(tiny, "-n", "1", "-o", "images/", "--force", "--scale", "3") == 0
    assert os.listdir("images") == ["000000.png"]
    with Image.open("images/000000.png") as picture:
        assert picture.size == (3 * SIDE, 3 * SIDE)
    assert os.listdir() == ["images"]


def test_a_gif_ends_with_the_grid(tiny: str) -> None:
    assert run(["sample", "-m", tiny, "-n", "4", "--steps", "5", "-o", "a.gif"]) == 0
    assert run(["sample", "-m", tiny, "-n", "4", "--steps", "5", "-o", "a.png"]) == 0
    with Image.open("a.gif") as film, Image.open("a.png") as grid:
        assert film.n_frames == 5  # type: ignore[attr-defined]
        first = np.asarray(film.convert("L"))
        film.seek(4)
        assert np.array_equal(np.asarray(film.convert("L")), np.asarray(grid))
        assert not np.array_equal(first, np.asarray(grid))


def test_a_film_strip_lies_beside_whatever_is_written(rgb: str) -> None:
    for out in ("a.png", "b.npz", "c"):
        options = ["-n", "12", "--batch-size", "5", "--steps", "20", "--trajectory", "-o", out]
        assert run(["sample", "-m", rgb, *options]) == 0
    strips = ["a-trajectory.png", "b-trajectory.png", "c-trajectory.png"]
    assert sorted(os.listdir()) == sorted(["a.png", "b.npz", "c", *strips])
    with Image.open("a-trajectory.png") as strip:
        side = 10 * (4 * SIDE + 2) + 2
        assert (strip.mode, strip.size) == ("RGB", (side, side))
        last = np.asarray(strip)[2::4, -(4 * SIDE + 2) : -2 : 4][:SIDE]
    assert np.array_equal(last, arrays("b.npz")["images"][0])


def test_four_channels_fit_an_array_only(capsys: Any) -> None:
    latent = save(Path("latent.safetensors"), replace(TINY, in_channels=4))
    assert sample(latent, "-n", "2", "-o", "a.png") == 2
    assert capsys.readouterr().err == ("error: pictures have 1 channel (grey) or 3 (RGB); got 4\n")
    assert sample(latent, "-n", "2", "-o", "a.npz") == 0
    assert arrays("a.npz")["images"].shape == (2, SIDE, SIDE, 4)


def test_doctor_says_what_runs_and_why_not(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(["doctor"]) == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    report = {line[0]: line[1:] for line in lines}
    assert report["PyTorch"] == [torch.__version__]
    assert report["reference on cpu"] == ["yes", "PyTorch"]
    reason = why_not("triton", "cpu")
    assert report["triton on cpu"] == ["no", reason]
    assert report["auto on cpu"] == ["yes", f"takes {resolve('auto', 'cpu')}"]
    if not torch.cuda.is_available():
        assert report["triton on cuda"][0] == "no"
        assert "cuda" in report["triton on cuda"][1].lower()
    assert report["diffusers"][0] == "yes"
    for name in checkpoint.models():
        assert report[name][0] == "yes"


def test_doctor_survives_a_setting_that_cannot_be_honoured() -> None:
    done = process("doctor", env={**os.environ, "STEPFUSE_ISA": "sse", "COLUMNS": "300"})
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"cpp on cpu +no +(STEPFUSE_ISA must be|the C\+\+ module is not)", done.stdout)


def test_version_and_help_do_not_wait_for_torch() -> None:
    script = (
        "import sys; from stepfuse.engine.cli import run; "
        "status = [run([flag]) for flag in ('--version', '--help')] + [run(['sample', '--help'])]; "
        "sys.exit(any(status) or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"stepfuse {sf.__version__}\n")
    for word in ("doctor", "sample", "train", "Examples", "threes.png"):
        assert word in done.stdout


def test_train_is_imported_when_it_is_called(capsys: Any) -> None:
    assert run(["train", "--help"]) == 0
    assert "--learning-rate" in capsys.readouterr().out
    assert run(["train", "missing.npz", "--out", "run"]) == 2
    assert re.fullmatch("error: .*missing.npz.*\n", capsys.readouterr().err)
    assert run(["train", "missing.npz", "--out", "run", "--steps", "0"]) == 2
    assert re.fullmatch("error: steps .*0.*\n", capsys.readouterr().err)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("words", "line"),
    [(["smaple"], "No such command 'smaple'.*"), (["--steps", "3"], "No such option: --steps.*")],
)
def test_unknown_commands(words: list[str], line: str, capsys: Any) -> None:
    assert run(words) == 2
    assert re.fullmatch(f"error: {line}\n", capsys.readouterr().err)


def test_every_public_name_is_there() -> None:
    for name in sf.__all__:
        assert getattr(sf, name) is not None
    assert set(sf.__all__) <= set(dir(sf))
    with pytest.raises(AttributeError, match="module 'stepfuse' has no attribute 'diffuse'"):
        _ = sf.diffuse
