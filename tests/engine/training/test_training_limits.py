"""What training refuses before its first step: places, sizes, and states of other runs."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.cli.cli_case import process

from stepfuse.engine.cli import run
from stepfuse.engine.files import writing
from stepfuse.engine.networks.unet import UNetConfig
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.training import loop
from stepfuse.engine.training.config import TrainConfig
from stepfuse.engine.training.data import load_images
from stepfuse.engine.training.loop import Run, train
from stepfuse.engine.training.state import save_state

pytestmark = pytest.mark.usefixtures("empty_folder")
TINY = UNetConfig(
    base_channels=8,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    attention_factors=(),
    norm_groups=4,
)


def data(
    name: str = "a", shape: tuple[int, ...] = (4, 8, 8), classes: int = 2, letter: str = ""
) -> Path:
    """An archive of images of classes a0, a1, ..., by its name or another letter."""
    path = Path(f"{name}.npz")
    labels = np.arange(shape[0]) % classes
    names = [f"{letter or name}{k}" for k in range(classes)]
    np.savez(path, images=np.zeros(shape, np.uint8), labels=labels, class_names=names)
    return path


def tiny(images: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "unet": TINY,
        "steps": 1,
        "batch_size": 2,
        "sample_every": 0,
        "out": Path("run"),
    }
    return TrainConfig(data=images, **(defaults | options))


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a step is taken."""
    monkeypatch.setattr(Run, "advance", lambda self: pytest.fail("a step was taken"))


@pytest.mark.usefixtures("no_step")
def test_a_place_that_is_no_folder() -> None:
    images = data()
    Path("file").write_bytes(b"")
    for out in ("file", "file/run"):
        with pytest.raises(OSError, match=r"cannot write the folder .*file is not a folder"):
            train(tiny(images, out=Path(out)))
    for name in ("state.pt", "model.safetensors"):
        Path("run", name).mkdir(parents=True)
        with pytest.raises(OSError, match=r"cannot write .*: it is a folder|holds a run already"):
            train(tiny(images))
        shutil.rmtree("run")


@pytest.mark.usefixtures("no_step")
def test_a_place_that_is_read_only() -> None:
    images = data()
    for out in ("/proc/run", "/proc/self/run"):
        with pytest.raises(OSError, match=out):
            train(tiny(images, out=Path(out)))


@pytest.mark.usefixtures("no_step")
def test_a_disk_without_room_for_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    images = data()
    asked = []
    reserve = writing._reserve

    def counted(descriptor: int, size: int) -> None:
        asked.append(size)
        reserve(descriptor, 2**60 if size > writing.PROBE_BYTES else size)

    monkeypatch.setattr(writing, "_reserve", counted)
    with pytest.raises(OSError, match=r"run/state\.pt"):
        train(tiny(images, out=Path("new/run")))
    assert sorted(os.listdir()) == ["a.npz"]
    weights = sum(p.numel() for p in Run(tiny(images), load_images(images)).model.parameters())
    assert asked == [writing.PROBE_BYTES, 16 * weights]


def test_the_size_that_is_tried_is_that_of_a_state() -> None:
    images = data()
    config = tiny(images)
    train(config)
    saved = Path("run/state.pt").stat().st_size
    tried = Run(config, load_images(images)).state_bytes()
    # beside the weights there are names, records of the archive and AdamW's counters
    assert 0.3 * saved < tried < saved


def test_a_disk_that_is_full_ends_the_command_before_its_first_step() -> None:
    data()
    done = process(
        *["train", "a.npz", "--out", "run", "--batch-size", "1"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "error: run/state.pt: File too large"
    assert "images/s" not in done.stderr
    assert os.listdir() == ["a.npz"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": 10**12}, "steps is 1000000000000; accepted: at least 1, at most 1000000000"),
        (
            {"batch_size": 10**10},
            "batch_size is 10000000000; accepted: at least 1, at most 1000000",
        ),
        ({"learning_rate": float("inf")}, "learning_rate is inf; accepted: above 0 and finite"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; accepted: above 0 and finite"),
        ({"seed": 2**64}, "seed is 18446744073709551616; accepted: 64 bits"),
        ({"background": "green"}, "background is 'green'; accepted: 'white' or 'black'"),
    ],
)
def test_values_that_no_machine_takes(options: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        tiny(data(), **options)


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63, -(2**63), -1])
def test_every_seed_of_64_bits_trains(seed: int) -> None:
    train(tiny(data(), seed=seed))


@pytest.mark.usefixtures("no_step")
def test_a_batch_larger_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfuse.kernels.limits.physical_memory", lambda: 10**6)
    with pytest.raises(ValueError, match=r"batch_size 1000000 cannot fit: at least 1\.024 GB"):
        train(tiny(data(), batch_size=10**6))
    assert not Path("run").exists()


COMMANDS = [
    (["--steps", str(10**12)], "steps is 1000000000000; accepted: at least 1, at most 1000000000"),
    (["--batch-size", str(10**10)], "batch_size is 10000000000; accepted: at least 1, .*"),
    (["--batch-size", "1e10"], "Invalid value for '--batch-size'.*'1e10'.*"),
    (["--background", "green"], "Invalid value for '--background'.*'green'.*"),
    (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
]


@pytest.mark.parametrize(("options", "line"), COMMANDS)
def test_the_command_refuses_in_one_line(options: list[str], line: str, capsys: Any) -> None:
    data()
    assert run(["train", "a.npz", "--out", "run", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.fullmatch(f"error: {line}\n", captured.err)
    assert os.listdir() == ["a.npz"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link", "damaged"])
def test_data_that_cannot_be_read_is_one_line(kind: str, capsys: Any) -> None:
    Path("in").mkdir()
    Image.new("L", (8, 8)).save("in/a.png")
    path = Path("in/x.png")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "damaged":
        path.write_bytes(Path("in/a.png").read_bytes()[:44])
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    options = ["--steps", "1", "--batch-size", "1"]
    assert run(["train", "in", "--out", "run", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(("error: in/x.png is a ", "error: cannot read the image in/x.png: "))
    assert error.count("\n") == 1
    assert os.listdir() == ["in"]


def test_the_command_says_what_the_data_are(capsys: Any) -> None:
    Path("in").mkdir()
    Image.new("RGBA", (8, 8)).save("in/a.png")
    Path("in/notes.txt").write_text("")
    options = ["--steps", "1", "--batch-size", "1", "--sample-every", "0"]
    assert run(["train", "in", "--out", "run", "--background", "black", *options]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "1 images of 8x8, 3 channels, 8 bits",
        "1 file with transparency, laid on black",
        "1 file skipped: 1 .txt",
    ]


def test_resuming_names_everything_that_differs() -> None:
    config = tiny(data("a", classes=2))
    train(config)
    again = replace(config, resume=True)
    wide = replace(TINY, base_channels=16)
    for other, line in (
        (replace(again, data=data("b")), "another classes: a0 a1, now b0 b1: resume with what"),
        (replace(again, data=data("c", (4, 8, 8, 3), letter="a")), "another channels: 1, now 3"),
        (
            replace(again, data=data("e", (4, 8, 12), letter="a")),
            "another image_size: '8x8', now '8x12': resume",
        ),
        (
            replace(again, data=data("d", (6, 8, 8), 3), prediction_type="v_prediction"),
            "another prediction_type: 'epsilon', now 'v_prediction'; another classes: a0 a1, now "
            "d0 d1 d2: resume with what it had, or start a run of its own in another folder",
        ),
        (replace(again, unet=wide), "another unet.base_channels: 8, now 16: resume"),
        (replace(again, background="black"), "another background: 'white', now 'black'"),
        (
            replace(again, schedule=Schedule.linear(100)),
            "another schedule: 0.0001 .* 0.02 (1000 in all), now 0.001",
        ),
    ):
        with pytest.raises(ValueError, match=r"state\.pt belongs to a run with") as caught:
            train(other)
        for part in line.split(" .* "):
            assert part in str(caught.value)


def test_unlabelled_images_for_a_run_with_classes() -> None:
    config = tiny(data())
    train(config)
    np.savez("plain.npz", images=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="another classes: a0 a1, now none"):
        train(replace(config, data=Path("plain.npz"), resume=True))


def test_a_state_that_does_not_fit_its_own_words() -> None:
    config = tiny(data())
    train(config)
    path = Path("run/state.pt")
    state = torch.load(path, weights_only=True)
    for name, value in (("model", {}), ("ema", {"updates": 1}), ("step", "x"), ("rng", None)):
        save_state(path, {**state, name: value})
        with pytest.raises(ValueError, match="the saved state does not fit this run: ") as caught:
            train(replace(config, resume=True))
        assert "\n" not in str(caught.value)
    state.pop("optimizer")
    save_state(path, state)
    with pytest.raises(ValueError, match="the saved state does not fit this run: 'optimizer'"):
        train(replace(config, resume=True))


def test_a_state_whose_identity_is_no_table() -> None:
    config = tiny(data())
    train(config)
    save_state(Path("run/state.pt"), {"identity": 5})
    with pytest.raises(ValueError, match=r"state\.pt is truncated or no training state"):
        train(replace(config, resume=True))


def test_the_first_check_comes_before_the_data_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: Any) -> Any:
        pytest.fail("the data were read")

    monkeypatch.setattr(loop, "load_images", read)
    Path("file").write_bytes(b"")
    for config, error in (
        (tiny(Path("a.npz"), out=Path("file/run")), OSError),
        (tiny(Path("a.npz"), resume=True), FileNotFoundError),
    ):
        with pytest.raises(error):
            train(config)


def test_memory_that_runs_out_while_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(path: Path) -> Any:
        raise MemoryError

    monkeypatch.setattr("stepfuse.engine.training.data.read_archive", too_much)
    with pytest.raises(ValueError, match=r"a\.npz does not fit into memory; accepted: fewer"):
        load_images(data())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nothing_stays_open() -> None:
    before = os.listdir("/proc/self/fd")
    load_images(data())
    assert len(os.listdir("/proc/self/fd")) == len(before)
