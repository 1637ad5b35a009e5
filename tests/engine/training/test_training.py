"""Training: a run learns, can be stopped at any time, and says what it cannot use."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.signalled import start
from typer import Typer
from typer.testing import CliRunner, Result

from stepfuse.engine.cli.train import train_command
from stepfuse.engine.networks import checkpoint
from stepfuse.engine.networks.unet import UNetConfig
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.training.config import TrainConfig
from stepfuse.engine.training.data import load_images
from stepfuse.engine.training.loop import (
    Run,
    batch_indices,
    drop_labels,
    has_bfloat16,
    learning_rate_factor,
    train,
)
from stepfuse.engine.training.state import load_state, save_state

TINY = UNetConfig(
    base_channels=8,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    attention_factors=(),
    norm_groups=4,
    dropout=0.1,
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six 8x8 images of three classes: bars at different places."""
    pictures = np.zeros((6, 8, 8), dtype=np.uint8)
    for n in range(6):
        pictures[n, :, n : n + 2] = 255
    path = tmp_path / "bars.npz"
    np.savez(path, images=pictures, labels=np.arange(6) % 3)
    return path


def tiny(images: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "unet": TINY,
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 2,
        "save_every": 100,
        "sample_every": 0,
        "out": images.parent / "run",
    }
    return TrainConfig(data=images, **(defaults | options))


def test_overfits_a_few_images(images: Path) -> None:
    """A network that predicts zero has loss 1; a hundred and fifty steps must leave a fifth."""
    unet = replace(TINY, base_channels=16, dropout=0.0)
    config = tiny(images, unet=unet, steps=150, batch_size=32, learning_rate=5e-3, autocast=False)
    run = Run(config, load_images(images))
    first = None
    for _ in range(config.steps):
        run.advance()
        first = first or run.loss
    assert first == pytest.approx(1.0, abs=0.1)
    torch.manual_seed(1)
    x0, labels = run.data.batch(torch.arange(6).repeat(20))
    t, noise = torch.randint(1000, (120,)), torch.randn_like(x0)
    with torch.no_grad():
        assert float(run.losses(x0, noise, t, labels).mean()) < 0.2


def test_resumed_equals_uninterrupted_bit_for_bit(images: Path) -> None:
    straight = train(tiny(images, steps=6, out=images.parent / "a"))
    config = tiny(images, steps=6, out=images.parent / "b")
    run = Run(config, load_images(images))
    for _ in range(3):
        run.advance()
    config.out.mkdir()
    save_state(config.out / "state.pt", run.state())
    torch.manual_seed(123)
    resumed = train(replace(config, resume=True))
    a, b = (torch.load(images.parent / name / "state.pt", weights_only=True) for name in ("a", "b"))
    flat_a, flat_b = flatten(a), flatten(b)
    assert flat_a.keys() == flat_b.keys()
    assert len(flat_a) > 200
    for key, value in flat_a.items():
        same = torch.equal(value, flat_b[key]) if torch.is_tensor(value) else value == flat_b[key]
        assert same, key
    assert straight.read_bytes() == resumed.read_bytes()


def flatten(state: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(state, dict):
        return {prefix: state}
    parts = [flatten(value, f"{prefix}/{key}") for key, value in state.items()]
    return {key: value for part in parts for key, value in part.items()}


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(images: Path) -> None:
    paths = [
        train(tiny(images, steps=2, seed=seed, out=images.parent / str(n)))
        for n, seed in enumerate((0, 0, 1))
    ]
    contents = [path.read_bytes() for path in paths]
    assert contents[0] == contents[1] != contents[2]


def test_the_finished_file_holds_the_averaged_weights(images: Path) -> None:
    path = train(tiny(images))
    loaded = checkpoint.load(path)
    state = torch.load(path.with_name("state.pt"), weights_only=True)
    assert loaded.labels == ("0", "1", "2")
    assert loaded.num_classes == 3
    assert loaded.sample_shape == (1, 8, 8)
    assert loaded.training["images"] == 24
    for name, parameter in loaded.model.named_parameters():
        torch.testing.assert_close(parameter, state["ema"]["shadow"][name], rtol=1e-3, atol=1e-6)


def test_sample_grids_are_written(images: Path) -> None:
    config = tiny(images, steps=2, sample_every=2)
    train(config)
    with Image.open(config.out / "samples_0000002.png") as grid:
        assert grid.size == (10 * 10 + 2, 4 * 10 + 2)
        assert grid.mode == "L"


def test_learned_variance_and_v_prediction_train(images: Path) -> None:
    for name, options in {
        "hybrid": {"unet": replace(TINY, learned_variance=True)},
        "v": {"prediction_type": "v_prediction"},
    }.items():
        path = train(tiny(images, steps=2, sample_every=2, out=images.parent / name, **options))
        loaded = checkpoint.load(path)
        assert loaded.model.config.learned_variance == (name == "hybrid")
        assert loaded.prediction_type == ("v_prediction" if name == "v" else "epsilon")
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction'; accepted: 'epsilon'"):
        tiny(
            images,
            unet=replace(TINY, learned_variance=True),
            prediction_type="v_prediction",
        )


ENDLESS = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from stepfuse.engine.training.config import TrainConfig
    from stepfuse.engine.training.loop import train
    from stepfuse.engine.networks.unet import UNetConfig
    unet = UNetConfig(
        base_channels=8, channel_multipliers=(1,), blocks_per_level=1, attention_factors=(),
        norm_groups=4,
    )
    train(TrainConfig(
        data=Path(sys.argv[1]), out=Path(sys.argv[2]), unet=unet, steps=10**6, batch_size=2,
        save_every=1, sample_every=0, resume=len(sys.argv) > 3,
    ))
    """
)


def start_endless(images: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", ENDLESS, str(images), str(out), *more]
    process = start(command, stderr=subprocess.PIPE)
    state, before = out / "state.pt", time.time_ns()
    deadline = time.monotonic() + 60
    while not (state.exists() and state.stat().st_mtime_ns > before):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "no state was written in a minute"
        time.sleep(0.02)
    return process


def test_a_killed_run_leaves_a_whole_state(images: Path) -> None:
    """It saves after each step, so that the kill falls into the writing more often than not."""
    out = images.parent / "run"
    process = start_endless(images, out)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] >= 1
    process = start_endless(images, out, "resume")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors
    assert torch.load(out / "state.pt", weights_only=True)["step"] > state["step"]
    others = [name for name in os.listdir(out) if name != "state.pt"]
    assert len(others) <= 1, "the kill may leave the file it was writing, nothing else may"
    assert all(name.endswith(".tmp") for name in others)


def test_labels_are_dropped_at_the_rate_asked_for() -> None:
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, 10, 0.15, torch.Generator().manual_seed(0))
    null = dropped == 10
    # Five standard deviations of a binomial share of 20,000.
    assert float(null.float().mean()) == pytest.approx(0.15, abs=5 * math.sqrt(0.15 * 0.85 / 2e4))
    assert torch.equal(dropped[~null], labels[~null])
    assert torch.equal(drop_labels(labels, 10, 0.0, torch.Generator()), labels)


def test_every_epoch_visits_every_image_once_in_another_order() -> None:
    epochs = torch.cat([batch_indices(step, 10, 4, seed=3) for step in range(10)]).view(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_learning_rate_rises_then_falls_to_zero(images: Path) -> None:
    def factors(decay: Any) -> list[float]:
        config = tiny(images, steps=14, warmup_steps=4, decay=decay)
        return [learning_rate_factor(step, config) for step in range(15)]

    for decay in ("none", "linear", "cosine"):
        assert factors(decay)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors("none")[-1] == 1
    assert factors("linear")[9] == pytest.approx(0.5)
    assert factors("cosine")[9] == pytest.approx(0.5)
    assert factors("linear")[-1] == pytest.approx(0)
    assert factors("cosine")[-1] == pytest.approx(0)


def test_autocast_follows_the_processor(images: Path) -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if flags:
        assert has_bfloat16("cpu") == ("avx512_bf16" in flags or "amx_bf16" in flags)
    assert Run(tiny(images), load_images(images)).autocast == has_bfloat16("cpu")
    assert not Run(tiny(images, autocast=False), load_images(images)).autocast


def test_a_state_that_cannot_be_used_says_why(images: Path) -> None:
    config = tiny(images, steps=1)
    train(config)
    with pytest.raises(FileExistsError, match="holds a run already; resume it"):
        train(config)
    with pytest.raises(FileNotFoundError, match=r"nothing to resume from: .*elsewhere"):
        train(replace(config, out=images.parent / "elsewhere", resume=True))
    with pytest.raises(ValueError, match="run with another batch_size: 4, now 2"):
        train(replace(config, batch_size=2, resume=True))
    with pytest.raises(ValueError, match="run with another schedule"):
        train(replace(config, schedule=Schedule.cosine(1000), resume=True))
    state = config.out / "state.pt"
    content = state.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"nonsense"):
        state.write_bytes(broken)
        with pytest.raises(ValueError, match="truncated or no training state") as caught:
            train(replace(config, resume=True))
        assert "\n" not in str(caught.value)


def test_a_failing_write_leaves_the_old_state(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(images)
    run = Run(config, load_images(images))
    path = images.parent / "state.pt"
    save_state(path, run.state())

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    run.advance()
    with pytest.raises(OSError, match="no space left"):
        save_state(path, run.state())
    assert load_state(path, run.identity())["step"] == 0
    assert not list(images.parent.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; accepted: at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"label_dropout": 1.5}, r"label_dropout is 1\.5; accepted: in \[0, 1\]"),
        ({"decay": "step"}, "decay is 'step'; accepted: 'none', 'linear' or 'cosine'"),
    ],
)
def test_a_config_that_cannot_run_says_so(images: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(images, **options)


def test_images_that_do_not_fit_the_network(tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", images=np.zeros((2, 7, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"images are 7 by 8; .* divisible by 2"):
        train(tiny(tmp_path / "odd.npz"))


def test_a_loss_that_is_not_finite_stops_the_run(images: Path) -> None:
    run = Run(tiny(images, learning_rate=1e30, warmup_steps=0, grad_clip=1e30), load_images(images))
    run.advance()
    with pytest.raises(FloatingPointError, match="the loss became"):
        run.advance()


def test_the_command_trains_and_resumes(images: Path) -> None:
    app = Typer()
    app.command()(train_command)
    out = images.parent / "run"
    options = ["--batch-size", "1", "--sample-every", "0", "--fp32", "--warmup-steps", "1"]

    def run(*more: str) -> Result:
        return CliRunner().invoke(app, [str(images), "--out", str(out), *options, *more])

    first = run("--steps", "1")
    assert first.exit_code == 0, first.output
    assert str(out / "model.safetensors") in first.output.replace("\n", "")
    assert checkpoint.load(out / "model.safetensors").training["steps"] == 1
    again = str(run("--steps", "1").exception)
    assert again == f"{out} holds a run already; resume it or take another folder"
    assert run("--steps", "2", "--resume").exit_code == 0
    assert checkpoint.load(out / "model.safetensors").training["steps"] == 2
    assert isinstance(run("--steps", "0").exception, ValueError)
