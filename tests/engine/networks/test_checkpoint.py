"""Checkpoints: round trip, errors, and what the embedded one can do."""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepfuse.engine.networks import checkpoint
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.schedule import Schedule

CONFIG = UNetConfig(
    in_channels=2,
    base_channels=8,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    norm_groups=4,
    num_classes=2,
    learned_variance=True,
)


def write(path: Path, **options: Any) -> UNet:
    torch.manual_seed(0)
    model = UNet(CONFIG)
    arguments: dict[str, Any] = {
        "schedule": Schedule.cosine(100),
        "prediction_type": "v_prediction",
        "sample_shape": (2, 8, 12),
        "labels": ["cat", "dög"],
        "training": {"steps": 7},
    }
    checkpoint.save(path, model, **(arguments | options))
    return model


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 0.0), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)],
)
def test_round_trip(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    path = tmp_path / "model.safetensors"
    model = write(path, dtype=dtype)
    path.with_suffix(".md").write_text("# a card", encoding="utf-8")
    loaded = checkpoint.load(path)
    assert loaded.model.config == CONFIG
    assert loaded.schedule == Schedule.cosine(100)
    assert loaded.schedule.name == "cosine"
    assert loaded.prediction_type == "v_prediction"
    assert loaded.sample_shape == (2, 8, 12)
    assert loaded.labels == ("cat", "dög")
    assert loaded.num_classes == 2
    assert loaded.training == {"steps": 7}
    assert loaded.card == "# a card"
    assert not loaded.model.training
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype is torch.float32
        assert not parameter.requires_grad
        original = dict(model.named_parameters())[name].detach()
        # float16 has an absolute floor of half its smallest subnormal.
        torch.testing.assert_close(parameter, original, rtol=tolerance, atol=2**-25)
    x, t = torch.randn(1, 2, 8, 12), torch.tensor([5])
    assert loaded.model(x, t).shape == (1, 4, 8, 12)


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", dtype=torch.float32)
    write(tmp_path / "b.safetensors", dtype=torch.float16)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.safetensors", "b.safetensors")]
    assert sizes[1] < 0.65 * sizes[0]


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    write(path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write(path, labels=["a", "b"])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="1 labels given; the network has 2 classes"):
        write(path, labels=["a"])
    model = UNet(CONFIG)
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"conv_in\.weight is not finite in torch\.float16"):
        checkpoint.save(path, model, Schedule.linear(), sample_shape=(2, 8, 8), labels=["a", "b"])
    assert not path.exists()


def test_an_unknown_name_lists_the_embedded_ones() -> None:
    with pytest.raises(ValueError, match="unknown checkpoint 'dogs'; accepted: 'digits'"):
        checkpoint.load("dogs")
    with pytest.raises(ValueError, match=r"unknown checkpoint '/no/where\.safetensors'"):
        checkpoint.load(Path("/no/where.safetensors"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.safetensors"
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no saf") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_foreign_file_is_one_clear_line(tmp_path: Path) -> None:
    pickled = tmp_path / "pickle.safetensors"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        checkpoint.load(pickled)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"no stepfuse checkpoint: it has metadata \[\]"):
        checkpoint.load(other)


def test_missing_weights_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path)
    with checkpoint.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, metadata)
    with pytest.raises(
        ValueError, match=r"does not describe a network: .*conv_in\.weight"
    ) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def judge_module() -> ModuleType:
    path = Path(__file__).parents[2] / "data" / "judge.py"
    spec = importlib.util.spec_from_file_location("judge", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> checkpoint.Checkpoint:
    return checkpoint.load("digits")


def test_digits_is_what_the_contract_says(digits: checkpoint.Checkpoint) -> None:
    assert checkpoint.models() == ["digits"]
    assert digits.sample_shape == (1, 32, 32)
    assert digits.labels == tuple("0123456789")
    assert digits.num_classes == 10
    assert digits.prediction_type == "epsilon"
    assert digits.schedule == Schedule.linear(1000)
    assert digits.model.config == UNetConfig.digits()
    assert digits.card.startswith("# digits")
    assert (checkpoint.FOLDER / "digits.safetensors").stat().st_size < 4e6


def test_digits_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    checkpoint.load("digits")


def test_the_judge_knows_its_trade() -> None:
    module = judge_module()
    assert module.judge_accuracy() > 0.99
    judge = module.load_judge()
    x = torch.full((50, 1, 32, 32), -1.0)
    blank = judge.agreement(x, torch.arange(50) % 10)
    assert blank == pytest.approx(0.1)


def test_digits_draws_the_digit_that_is_asked_for(digits: checkpoint.Checkpoint) -> None:
    """The card's figure is on 1,000 samples in 50 steps; this is a tenth of them in 25."""
    labels = torch.arange(100) % 10
    sampler = Sampler(digits.model, digits.schedule, steps=25, eta=0.0)
    x = sampler.sample(shape=(100, *digits.sample_shape), seed=0, condition={"labels": labels})
    judge = judge_module().load_judge()
    assert judge.agreement(x, labels) > 0.85
    # Another digit than the requested one must not satisfy the judge.
    assert judge.agreement(x, (labels + 1) % 10) < 0.1
