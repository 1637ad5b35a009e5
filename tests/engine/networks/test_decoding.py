"""What a checkpoint's samples are: its normalization, its own sampler, and all that is drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tests.engine.cli.cli_case import SIDE, TINY

import stepfuse as sf
from stepfuse.engine.cli import run
from stepfuse.engine.files.images import to_pixels, to_uint8
from stepfuse.engine.networks import checkpoint
from stepfuse.engine.networks.unet import UNet

NORMALIZATION = sf.Normalization((0.1, 0.5, 0.7), (0.3, 0.2, 0.05))
OWN = sf.SamplingDefaults(steps=4, spacing="trailing", eta=0.5)


@pytest.fixture(scope="module")
def normalised(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of colour images with a normalization and a way of its own to be sampled."""
    torch.manual_seed(0)
    model = UNet(replace(TINY, in_channels=3, num_classes=None))
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    path = tmp_path_factory.mktemp("models") / "normalised.safetensors"
    checkpoint.save(
        path, model, sf.Schedule.keras(100), sample_shape=(3, SIDE, SIDE),
        normalization=NORMALIZATION, sampling=OWN,
    )  # fmt: skip
    return str(path)


def test_pixels_are_what_they_were() -> None:
    """Bit for bit the same pixels by way of [0, 1], rounded and truncated, infinities too."""
    x = torch.cat([torch.randn(3, 1, 40, 40), torch.linspace(-1.1, 1.1, 1600).view(1, 1, 40, 40)])
    x[0, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    digits = replace(sf.load("digits"), normalization=None)
    images = digits.decode(x)
    assert (float(images.min()), float(images.max())) == (0, 1)
    for rounding in ("nearest", "truncate"):
        assert torch.equal(to_uint8(x, rounding), to_uint8(images, rounding, low=0))  # type: ignore[arg-type]
    assert np.array_equal(to_pixels(x), to_pixels(images, low=0))
    assert digits.decode(x.double()).dtype is torch.float64
    assert digits.decode(x.bfloat16()).dtype is torch.float32


def test_a_normalization_is_its_formula() -> None:
    pixels = torch.rand(5, 3, 4, 6, dtype=torch.float64)
    channels = pixels.movedim(1, 0).flatten(1)
    found = sf.Normalization(
        tuple(channels.mean(1).tolist()), tuple(channels.std(1, correction=0).tolist())
    )
    x = found.encode(pixels)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.decode(x), pixels)
    assert float(found.decode(1e3 * torch.ones(1, 3, 1, 1)).max()) == 1


def test_it_is_kept_in_the_file(normalised: str) -> None:
    loaded, about = sf.load(normalised), checkpoint.describe(normalised)
    for found in (loaded, about):
        assert found.normalization == NORMALIZATION
        assert found.sampling == OWN
    assert sf.load("digits").normalization is None
    assert sf.load("digits").sampling == sf.SamplingDefaults()
    x = torch.randn(2, 3, 4, 4)
    columns = (torch.tensor(v).view(-1, 1, 1) for v in (NORMALIZATION.mean, NORMALIZATION.std))
    mean, std = columns
    torch.testing.assert_close(loaded.decode(x), (mean + std * x).clamp(0, 1))


def edited(source: str, path: Path, **changes: Any) -> str:
    """A copy whose description has other entries."""
    with safe_open(source, framework="pt") as file:
        info = json.loads(file.metadata()[checkpoint.FORMAT])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {checkpoint.FORMAT: json.dumps({**info, **changes})})
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": {"mean": [0.5], "std": [0.2]}}, "normalization is .* 3 numbers each"),
        (
            {"normalization": {"mean": [0, 0, 0], "std": [1, 0, 1]}},
            "std must be positive .* channel 1",
        ),
        ({"normalization": [1, 2]}, "normalization is"),
        ({"sampling": {"solver": "x"}}, "sampling is .*; accepted: eta, method, spacing, steps"),
        ({"sampling": {"method": "leapfrog"}}, "method must be one of"),
        ({"autoencoder": {}}, "it has autoencoder, which stepfuse .* needs a newer version"),
    ],
)
def test_a_description_that_cannot_be(
    normalised: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = edited(normalised, tmp_path / "edited.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        sf.load(path)
    with pytest.raises(ValueError, match=message):
        checkpoint.describe(path)


def test_a_kind_of_a_later_version(tmp_path: Path) -> None:
    path = tmp_path / "later.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"stepfuse-latent-1": "{}"})
    with pytest.raises(ValueError, match=r"kind 'stepfuse-latent-1', .* needs a newer version"):
        sf.load(path)


def test_its_own_sampler(normalised: str) -> None:
    loaded = sf.load(normalised)
    own = loaded.sampler()
    assert own.timesteps == [99, 74, 49, 24]
    assert (own.update.eta, own.update.clip_sample) == (0.5, None)
    other = loaded.sampler(steps=2, clip_sample=2.0, method="ddpm")
    assert other.timesteps == [99, 49]
    assert (other.update.eta, other.update.clip_sample) == (0, 2)
    assert loaded.sampler(timesteps=[7, 3]).timesteps == [7, 3]
    assert loaded.sampler(steps=None, eta=0.25).update.eta == 0.25
    digits = sf.load("digits").sampler()
    assert (len(digits.timesteps), digits.update.clip_sample) == (50, 1)
    with pytest.raises(TypeError, match="sampler has no argument 'step'; accepted: method, steps"):
        loaded.sampler(step=3)


def test_models() -> None:
    assert "digits" in sf.models()
    for name in sf.models():
        assert sf.load(name).model is not None


@pytest.mark.usefixtures("empty_folder")
def test_every_picture_of_the_command_line_is_decoded(normalised: str) -> None:
    """Array, grid, animation, strip and generated shard: the checkpoint's own images."""
    loaded = sf.load(normalised)
    x = loaded.sampler().sample((3, *loaded.sample_shape))
    expected = to_pixels(loaded.decode(x), low=0)
    told = ["-m", normalised, "-n", "3"]
    assert run(["sample", *told, "-o", "a.npz"]) == 0
    with np.load("a.npz") as read:
        assert np.abs(read["images"].astype(int) - expected).max() <= 1
        settings = json.loads(str(read["settings"]))
    assert (settings["steps"], settings["spacing"], settings["eta"]) == ("4", "trailing", 0.5)
    assert run(["sample", *told, "-o", "a.gif"]) == 0
    with Image.open("a.gif") as film:
        assert film.n_frames <= 4
    assert run(["sample", *told, "-o", "f/", "--trajectory"]) == 0
    first = np.asarray(Image.open("f/000000.png")).astype(int)
    assert np.abs(first - expected[0]).max() <= 1
    with Image.open("f-trajectory.png") as strip:  # the last of its four frames is the image
        last = np.asarray(strip)
    scale = 4
    end = last[2 : 2 + scale * SIDE : scale, -2 - scale * SIDE : -2 : scale].astype(int)
    assert np.abs(end - expected[0]).max() <= 1
    line = ["generate", *told, "--out", "run", "--batch-size", "3", "--shard-size", "3"]
    assert run([*line, "--threads", "1", "--format", "npz"]) == 0
    (shard,) = Path("run/shards").glob("*.npz")
    with np.load(shard) as read:
        made = read[next(name for name in read if read[name].ndim == 4)]
    assert np.abs(made.astype(int) - expected).max() <= 1
    recipe = json.loads(Path("run/job.json").read_text())["identity"]["sampling"]
    assert (recipe["steps"], recipe["spacing"], recipe["eta"]) == ("4", "trailing", 0.5)


@pytest.mark.usefixtures("empty_folder")
def test_samples_of_npy_are_decoded_to_the_usual_range(normalised: str) -> None:
    line = ["generate", "-m", normalised, "-n", "2", "--out", "run", "--batch-size", "2"]
    assert run([*line, "--shard-size", "2", "--threads", "1", "--format", "npy"]) == 0
    (shard,) = Path("run/shards").glob("*.npy")
    loaded = sf.load(normalised)
    x = loaded.sampler().sample((2, *loaded.sample_shape))
    torch.testing.assert_close(
        torch.tensor(np.load(shard)), 2 * loaded.decode(x) - 1, rtol=1e-4, atol=1e-4
    )


@pytest.mark.usefixtures("empty_folder")
def test_a_whole_loop_gives_decoded_images(normalised: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    told = [
        "export",
        "-m",
        normalised,
        "--whole-loop",
        "--eta",
        "0",
        "--batch",
        "2",
        "-o",
        "a.onnx",
    ]
    assert run(told) == 0
    loaded = sf.load(normalised)
    x_T = torch.randn(2, *loaded.sample_shape)
    session = runtime.InferenceSession("a.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["images"], {"x_T": x_T.numpy()})
    expected = 2 * loaded.decode(loaded.sampler(eta=0.0).sample(x_T.shape, x_T=x_T)) - 1
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=1e-3)
    known = sf.export.read_metadata("a.onnx")
    assert known.normalization is not None
    assert known.normalization.mean == pytest.approx(NORMALIZATION.mean)
    assert known.sampler["timesteps"] == [99, 74, 49, 24]
    with pytest.raises(ValueError, match="clip_sample must be None for a checkpoint with"):
        sf.export.onnx_loop(loaded, "b.onnx")


@pytest.mark.usefixtures("empty_folder")
def test_no_likelihood_of_normalised_images(normalised: str, capsys: Any) -> None:
    np.savez("a.npz", images=np.zeros((2, SIDE, SIDE, 3), np.uint8))
    assert run(["likelihood", "a.npz", "-m", normalised]) == 2
    assert "accepted: a model without a normalization" in capsys.readouterr().err
