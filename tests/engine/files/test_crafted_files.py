"""Files made to hurt: refused at once, by name, whatever they claim and whatever they are."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from tests.engine.cli.cli_case import sample
from tests.engine.training.picture_case import a_minute

import stepfuse as sf
from stepfuse.bench import record, suite_file
from stepfuse.engine.export.metadata import read_metadata
from stepfuse.engine.export.to_onnx.facts import read_facts
from stepfuse.engine.export.to_tensorrt.engine_file import read_engine, read_info
from stepfuse.engine.files import reading
from stepfuse.engine.networks import adm, checkpoint
from stepfuse.engine.training.data import load_images
from stepfuse.engine.training.state import load_state

HUGE = 10**9


def crafted(source: str, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint whose metadata were changed; its weights are those of the source."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    info = json.loads(metadata[checkpoint.FORMAT])
    change(info)
    path.write_bytes(serialise(tensors, {checkpoint.FORMAT: json.dumps(info)}))
    return path


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("base_channels", HUGE, r".*4000000000.*"),
        ("base_channels", 10**20, r".*"),
        ("in_channels", HUGE, r"sample_shape is '\[1, 8, 8\]'; accepted: \[1000000000, H, W\] .*"),
        ("blocks_per_level", HUGE, "it has 2000000000 blocks, and the file 111 weights"),
        ("channel_multipliers", [1] * 100_000, ".*; accepted: .*, at most 16 of them"),
        ("channel_multipliers", [1, HUGE], ".*"),
        ("num_classes", HUGE, "labels is .*; accepted: 1000000000 names"),
        ("embedding_features", HUGE, ".*"),
        ("attention_factors", [1] * 1_000_000, r"of its weights the file lacks .* and \d+ more"),
    ],
)
def test_a_network_of_huge_sizes(
    tiny: str, tmp_path: Path, name: str, value: Any, line: str
) -> None:
    path = crafted(
        tiny, tmp_path / "c.safetensors", lambda info: info["unet"].update({name: value})
    )
    with (
        a_minute(),
        pytest.raises(ValueError, match=f"^{path} does not describe a network: {line}$") as e,
    ):
        checkpoint.load(path)
    assert len(str(e.value)) < 700


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("sample_shape", [1, 10**6, 10**6], "an image of 1x1000000x1000000 cannot fit: .*"),
        ("sample_shape", [1, 8, 7], "sample_shape is .*; accepted: .* divisible by 2"),
        ("sample_shape", [3, 8, 8], r"sample_shape is .*; accepted: \[1, H, W\] .*"),
        ("sample_shape", ["1", 8, 8], "sample_shape is .*"),
        ("sample_shape", [1, -8, 8], "sample_shape is .*"),
        ("labels", ["circle"], "labels is .*; accepted: 3 names"),
        ("labels", [1, 2, 3], "labels is .*; accepted: 3 names"),
        ("prediction_type", ["epsilon"], "prediction_type is .*; accepted: 'epsilon' or .*"),
        ("training", 5, "training is '5'; accepted: an object"),
        ("schedule", 5, "schedule is '5'; accepted: a name"),
    ],
)
def test_a_description_that_fits_no_network(
    tiny: str, tmp_path: Path, name: str, value: Any, line: str
) -> None:
    path = crafted(tiny, tmp_path / "c.safetensors", lambda info: info.update({name: value}))
    with pytest.raises(ValueError, match=f"^{path} does not describe a network: {line}$"):
        checkpoint.load(path)


@pytest.mark.usefixtures("empty_folder")
def test_the_command_line_refuses_it_in_one_line(tiny: str, tmp_path: Path, capsys: Any) -> None:
    path = crafted(
        tiny, tmp_path / "c.safetensors", lambda info: info["unet"].update(blocks_per_level=HUGE)
    )
    assert sample(str(path)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {path} does not describe a network: ")
    assert captured.err.count("\n") == 1
    assert set(os.listdir()) <= {"c.safetensors"}


@pytest.mark.parametrize("length", [0, 2, 10**6, 2**40, 2**63 - 1, 2**64 - 1])
def test_a_header_longer_than_its_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match=r"c\.safetensors is (truncated or|no stepfuse)"):
        checkpoint.load(path)


@pytest.mark.parametrize("shape", [[10**12], [2**40, 2**40], [0, 10**18], [-1]])
def test_a_tensor_larger_than_its_file(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "c.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=r"c\.safetensors is truncated or no safetensors file"):
        checkpoint.load(path)


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "checkpoint": (checkpoint.load, ".safetensors"),
    "training state": (lambda path: load_state(path, {}), ".pt"),
    "training images": (load_images, ".npz"),
    "adm weights": (adm._read, ".pt"),
    "adm safetensors": (adm._read, ".safetensors"),
    "onnx": (read_facts, ".onnx"),
    "onnx metadata": (read_metadata, ".onnx"),
    "onnx denoiser": (sf.OnnxDenoiser, ".onnx"),
    "engine": (read_engine, ".engine"),
    "engine header": (read_info, ".engine"),
    "bench record": (record.load, ".json"),
    "bench suites": (suite_file.read, ".json"),
    "text": (reading.read_text, ".txt"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path, reader: str) -> None:
    read, suffix = READERS[reader]
    for kind in ("a named pipe", "a folder", "a device", "a symbolic link to nothing"):
        path = tmp_path / f"{kind.split()[-1]}{suffix}"
        if kind == "a named pipe":
            os.mkfifo(path)
        elif kind == "a folder":
            if reader == "training images":
                continue  # a folder is what it reads
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "a device" else "nowhere")
        with a_minute(), pytest.raises(ValueError, match=f"{path} is {kind}"):
            read(path)


@pytest.mark.parametrize("reader", [name for name in READERS if name != "text"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 5000, b"PK\x03\x04", b"[" * 9999])
def test_what_is_no_such_file_is_a_line(tmp_path: Path, reader: str, content: bytes) -> None:
    read, suffix = READERS[reader]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with a_minute(), pytest.raises(ValueError, match=str(path)) as caught:
        read(path)
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("reader", ["training state", "adm weights", "training images"])
def test_python_objects_are_refused_without_a_hint_to_load_them(
    tmp_path: Path, reader: str
) -> None:
    read, suffix = READERS[reader]
    path = tmp_path / f"a{suffix}"
    for write in (
        lambda: torch.save({"identity": {}, "x": Trap()}, path),
        lambda: path.write_bytes(pickle.dumps(Trap())),
    ):
        write()
        with pytest.raises(ValueError, match=str(path)) as caught:
            read(path)
        text = str(caught.value).lower()
        for word in ("weights_only", "allow_pickle", "trust", "unsafe", "torch.load", "\n"):
            assert word not in text


def test_reasons() -> None:
    assert reading.reason(ValueError("one\ntwo")) == "one"
    assert reading.reason(ValueError("")) == "ValueError"
    hint = "Weights only load failed. This file can still be loaded, set `weights_only=False`"
    assert reading.reason(RuntimeError(hint)) == "it holds Python objects, which are never loaded"
