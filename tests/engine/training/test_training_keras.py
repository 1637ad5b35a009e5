"""Keras' DDIM example: its schedule, its objective, and what comes out of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.cli.cli_case import TINY
from tests.engine.sampling.analytic import Gaussian

import stepfuse as sf
from stepfuse.engine.cli import run as command
from stepfuse.engine.files.images import to_pixels
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.networks.unet_blocks import noise_variance_embedding
from stepfuse.engine.sampling.schedule import keras_abar
from stepfuse.engine.training.config import TrainConfig, keras_config
from stepfuse.engine.training.data import ImageData, load_images
from stepfuse.engine.training.keras import KerasObjective, normalization_of
from stepfuse.engine.training.loop import Run, train
from stepfuse.engine.training.state import load_state

NET = replace(TINY, num_classes=None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight coloured images of 8 by 8, each a gradient of its own."""
    ramp = np.linspace(0, 255, 8)
    pixels = [
        np.stack([np.roll(np.outer(ramp, np.ones(8)), k, c % 2) for c in range(3)], -1)
        for k in range(8)
    ]
    np.savez(tmp_path / "data.npz", images=np.array(pixels).astype(np.uint8))
    return tmp_path / "data.npz"


def config(data: Path, **changes: Any) -> TrainConfig:
    settings = {"steps": 3, "batch_size": 8, "sample_every": 0, "autocast": False, "save_every": 2}
    return keras_config(data, data.parent / "run", unet=NET, **{**settings, **changes})


MAPS = [  # steps, A and B of image = A x_T + B, data N(.3, .5^2)
    (1, 0.005001500, 0.299969991),
    (5, 0.292700653, 0.298243796),
    (20, 0.382099384, 0.297707404),
    (1000, 0.417120170, 0.297497279),
]


@pytest.mark.parametrize(("steps", "slope", "shift"), MAPS)
def test_the_loop_is_theirs(steps: int, slope: float, shift: float) -> None:
    """Over every S-th angle of a long schedule, and over all of a schedule of S."""
    x_T = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    for total in {1000, steps}:
        schedule = sf.Schedule.keras(total)
        sampler = sf.Sampler(
            Gaussian(schedule), schedule, steps=steps, spacing="trailing", clip_sample=None,
            dtype=torch.float64, backend="reference",
        )  # fmt: skip
        image = sampler.sample(x_T.shape, x_T=x_T)
        torch.testing.assert_close(image, slope * x_T + shift, rtol=0, atol=2e-9)


def test_their_loop_written_out() -> None:
    """Predict both, mix them at the next angle; the last predicted image is the result."""
    schedule, steps = sf.Schedule.keras(20), 5
    model = Gaussian(schedule, mean=0.1, std=0.7)
    x = x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    first, last = math.acos(0.95), math.acos(0.02)
    image = x
    for k in range(steps):
        theta, following = (
            first + u * (last - first) for u in (1 - k / steps, 1 - (k + 1) / steps)
        )
        t = torch.full((2,), round((1 - k / steps) * 20) - 1)
        eps = model(x, t)
        image = (x - math.sin(theta) * eps) / math.cos(theta)
        x = math.cos(following) * image + math.sin(following) * eps
    sampler = sf.Sampler(
        model, schedule, steps=steps, spacing="trailing", clip_sample=None, dtype=torch.float64,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(sampler.sample(x_T.shape, x_T=x_T), image)


def test_the_ends_of_the_angles() -> None:
    abar = keras_abar(torch.tensor([0.0, 0.5, 1.0]))
    assert abar.sqrt().tolist() == pytest.approx([0.95, 0.594480, 0.02], abs=1e-6)
    noise = (1 - abar).sqrt().tolist()
    assert noise == pytest.approx([0.312249900, 0.804111, 0.999799980], abs=1e-6)
    whole = sf.Schedule.keras(7).alphas_cumprod
    torch.testing.assert_close(keras_abar(torch.arange(1, 8) / 7), whole, rtol=1e-6, atol=0)


def test_the_features_are_theirs() -> None:
    v = torch.tensor([0.0975, 0.5, 0.9996])
    angles = 2 * np.pi * np.exp(np.linspace(0, np.log(1000), 16)) * v.numpy()[:, None]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    # float32 angles of up to 6283
    torch.testing.assert_close(
        noise_variance_embedding(v, 32), torch.tensor(expected).float(), rtol=0, atol=2e-3
    )


def network(**changes: Any) -> UNet:
    torch.manual_seed(0)
    fed = {"embedding_input": "noise_variance", "embedding_features": 32}
    model = UNet(replace(NET, **{**fed, **changes}))
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    return model.eval().requires_grad_(False)


def test_an_index_stands_for_its_noise_variance() -> None:
    """In every dtype: cast to half precision, 1 - abar would be lost."""
    schedule, model = sf.Schedule.keras(50), network()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 20, 49])
    with pytest.raises(RuntimeError, match="call follow"):
        model(x, t)
    model.follow(schedule)
    variance = (1 - schedule.alphas_cumprod[t]).float()
    assert torch.equal(model(x, t), model(x, variance))
    assert model.noise_variances is not None
    for dtype in (torch.bfloat16, torch.float16):
        cast = network()
        cast.follow(schedule)
        cast.to(dtype)
        assert cast.noise_variances is not None
        assert torch.equal(cast.noise_variances(t), variance)
    assert "noise_variances.table" not in model.state_dict()
    plain = UNet(NET)
    plain.follow(schedule)  # nothing to follow
    with pytest.raises(ValueError, match="embedding_input is 'noise'; accepted: 'timestep' or"):
        replace(NET, embedding_input="noise")  # type: ignore[arg-type]


def test_sampled_captured_and_compiled() -> None:
    """The same loop: captured bit for bit as eagerly, compiled equal to rounding."""
    schedule, model = sf.Schedule.keras(40), network()
    model.follow(schedule)
    told: dict[str, Any] = {"steps": 8, "spacing": "trailing", "clip_sample": None}
    eager = sf.Sampler(model, schedule, graph=None, **told).sample((2, 1, 8, 8))
    captured = sf.Sampler(model, schedule, **told)
    assert torch.equal(captured.sample((2, 1, 8, 8)), eager)
    assert captured.stats()["replays"] == 8
    fast = sf.Sampler(model, schedule, optimize=True, **told)
    torch.testing.assert_close(fast.sample((2, 1, 8, 8)), eager, rtol=1e-3, atol=1e-3)
    compiled: Any = fast.denoiser.model
    assert "hoist_timestep" in compiled.explain()


def test_the_objective_is_its_formula() -> None:
    normalization = sf.Normalization((0.4,), (0.2,))
    x0, noise = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    u = torch.tensor([0.0, 0.3, 0.7, 1.0])
    model = network()
    theta = math.acos(0.95) + u * (math.acos(0.02) - math.acos(0.95))
    signal, sigma = (v.view(-1, 1, 1, 1) for v in (theta.cos(), theta.sin()))
    x = ((x0 + 1) / 2 - 0.4) / 0.2
    x_t = signal * x + sigma * noise
    output = model(x_t, theta.sin() ** 2)
    image = (x_t - sigma * output) / signal
    found = KerasObjective(normalization).errors(model, x0, noise, u, None)
    for mine, right in zip(found, ((output - noise).abs(), (image - x).abs()), strict=True):
        torch.testing.assert_close(mine, right.flatten(1).mean(1), rtol=2e-3, atol=2e-4)


def test_the_first_error_is_that_of_no_prediction(images: Path) -> None:
    """An output of zeros is off by E|N(0, 1)| = sqrt(2 / pi)."""
    run = Run(config(images, batch_size=256), load_images(images))
    run.advance()
    assert run.loss == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)
    assert set(run.figures()) == {"loss", "image"}


def test_the_average_has_no_warm_up(images: Path) -> None:
    run = Run(config(images), load_images(images))
    assert run.ema.current_decay() == 0.999
    assert Run(config(images, ema_warm_up=True), load_images(images)).ema.current_decay() == 0.1
    before = run.ema.shadow["conv_in.weight"].clone()
    run.advance()
    expected = 0.999 * before + 0.001 * run.model.conv_in.weight
    torch.testing.assert_close(run.ema.shadow["conv_in.weight"], expected)


def test_statistics_of_the_pixels(images: Path) -> None:
    data = load_images(images)
    found = normalization_of(data)
    pixels = data.images.double() / 255
    assert found.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert found.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    deep = ImageData((data.images.to(torch.int32) * 257).to(torch.uint16), None, ())
    again = normalization_of(deep)
    assert again.mean == pytest.approx(found.mean)
    assert again.std == pytest.approx(found.std)
    flat = data.images.clone()
    flat[:, 1] = 77
    with pytest.raises(ValueError, match=r"std must be positive .* 0.0 in channel 1"):
        normalization_of(ImageData(flat, None, ()))


def test_few_images_are_learnt(images: Path) -> None:
    """Eight images, 300 steps: an error of less than a quarter."""
    wide = replace(NET, base_channels=16, norm_groups=8)
    run = Run(replace(config(images, steps=300), unet=keras_config(images, images, unet=wide).unet),
              load_images(images))  # fmt: skip
    for _ in range(300):
        run.advance()
    assert run.loss < 0.25


def test_a_run_can_be_stopped_and_sampled(images: Path) -> None:
    """Two halves are the whole, bit for bit; the checkpoint has all that sampling needs."""
    whole = sf.load(train(replace(config(images, steps=4), out=images.parent / "whole")))
    halves = config(images, steps=4)
    run = Run(halves, load_images(images))
    train(replace(halves, steps=2))
    train(replace(halves, resume=True))
    run.restore(load_state(halves.out / "state.pt", run.identity()))
    assert run.step == 4
    loaded = sf.load(halves.out / "model.safetensors")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name])
    assert loaded.normalization == normalization_of(load_images(images))
    sampler = loaded.sampler()
    assert sampler.timesteps[:3] == [999, 949, 899]
    assert sampler.update.clip_sample is None
    x = sampler.sample((2, *loaded.sample_shape))
    pictures = loaded.decode(x)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    assert loaded.training["image_loss"] > 0


@pytest.mark.usefixtures("empty_folder")
def test_from_the_command_line(images: Path) -> None:
    """Trained, previewed and sampled; what is drawn is what the checkpoint decodes."""
    line = ["train", str(images), "--out", "run", "--objective", "keras", "--steps", "2"]
    assert command([*line, "--batch-size", "2", "--sample-every", "1", "--fp32"]) == 0
    assert Path("run/samples_0000001.png").is_file()
    assert command(["sample", "-m", "run/model.safetensors", "-n", "2", "-o", "a.npz"]) == 0
    loaded = sf.load("run/model.safetensors")
    assert loaded.model.config.embedding_input == "noise_variance"
    expected = to_pixels(loaded.decode(loaded.sampler().sample((2, *loaded.sample_shape))), low=0)
    with np.load("a.npz") as read:
        assert np.abs(read["images"].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type is not that of objective 'keras'"),
        ({"schedule": sf.Schedule.linear()}, "schedule is not that of objective 'keras'"),
        ({"objective": "vdm"}, "objective is 'vdm'; accepted: 'simple' or 'keras'"),
    ],
)
def test_settings_that_do_not_fit(images: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(images, **changes)
    with pytest.raises(ValueError, match="unet is not that of objective 'keras'"):
        TrainConfig(
            data=images, out=images, unet=UNetConfig.digits(), schedule=sf.Schedule.keras(),
            objective="keras",
        )  # fmt: skip
