"""Metadata: what goes into a file comes out of it bit for bit, or an error says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.export.export_case import BATCH, CLASSES, SIDE, exported

import stepfuse as sf
from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.metadata import Metadata

SCHEDULES = {
    "cosine": sf.Schedule.cosine(77),
    "zero terminal": sf.Schedule.scaled_linear(1000).zero_terminal_snr(),
    "one step": sf.Schedule.from_betas([0.1]),
    "thirds": sf.Schedule.from_betas(torch.rand(50, dtype=torch.float64) / 3, "thirds"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_comes_back_bit_for_bit(name: str) -> None:
    schedule = SCHEDULES[name]
    said = Metadata.from_strings(Metadata(schedule=schedule).to_strings())
    assert said.schedule is not None
    assert torch.equal(said.schedule.betas, schedule.betas)
    assert said.schedule.betas.dtype is torch.float64
    assert torch.equal(said.schedule.alphas_cumprod, schedule.alphas_cumprod)
    assert said.schedule.name == schedule.name


def test_everything_comes_back() -> None:
    full = Metadata(
        schedule=SCHEDULES["cosine"],
        prediction_type="sample",
        variance_type="learned_range",
        sample_shape=(3, 5, 7),
        num_classes=2,
        label_names=("Käse", 'with "quotes"'),
        label_input="labels",
        precision="bf16",
        batch=BatchProfile(1, 3, 9),
        opset=22,
        kind="sampler",
        sampler={"eta": 0.1, "clip_sample": None, "timesteps": [3, 1]},
    )
    for metadata in (full, Metadata()):
        strings = metadata.to_strings()
        assert all(isinstance(v, str) for pair in strings.items() for v in pair)
        assert Metadata.from_strings({**strings, "author": "somebody"}) == metadata


def test_a_file_says_what_it_was_made_from() -> None:
    said = sf.export.read_metadata(exported())
    assert said == Metadata(
        schedule=sf.Schedule.linear(100),
        prediction_type="epsilon",
        variance_type="fixed_small",
        sample_shape=(1, SIDE, SIDE),
        num_classes=CLASSES,
        label_input="labels",
        batch=BatchProfile.parse(BATCH),
        opset=21,
    )
    assert said.version == sf.__version__


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format_version", "2", "format version 2; accepted: 1"),
        ("format_version", "new", "damaged metadata of stepfuse"),
        ("schedule.betas", "AAA=", "damaged metadata of stepfuse"),
        ("schedule.betas", "?", "damaged metadata of stepfuse"),
        ("sample_shape", "[3, 4", "damaged metadata of stepfuse"),
        ("sample_shape", '"x"', "damaged metadata of stepfuse"),
        ("batch", "3:1:2", "MIN <= OPT <= MAX"),
        ("kind", "poem", "kind 'poem'; accepted: 'denoiser', 'sampler'"),
        ("precision", None, "'precision'"),
    ],
)
def test_damage_is_found(key: str, value: str | None, words: str) -> None:
    strings = Metadata(schedule=SCHEDULES["cosine"], batch=BatchProfile(1, 1, 1)).to_strings()
    strings["stepfuse." + key] = str(value)
    if value is None:
        del strings["stepfuse." + key]
    with pytest.raises(ValueError, match=words):
        Metadata.from_strings(strings)


def test_files_that_say_nothing(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    with pytest.raises(ValueError, match="is not there, or no file"):
        sf.export.read_metadata(tmp_path / "none.onnx")
    whole = exported().read_bytes()
    for name, content in {"cut": whole[:-9], "empty": b"", "text": b"plain words"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is truncated or no ONNX file"):
            sf.export.read_metadata(tmp_path / name)
    model = onnx.load(exported())
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "mute.onnx")
    with pytest.raises(ValueError, match="no metadata of stepfuse, only none at all"):
        sf.export.read_metadata(tmp_path / "mute.onnx")
