"""The engine file: what is written is read, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.to_tensorrt.engine_file import (
    BadEngineFile,
    EngineInfo,
    Layer,
    TensorSpec,
    check_library,
    read_engine,
    read_info,
    write_engine,
)

INFO = EngineInfo(
    library="tensorrt_rtx",
    library_version="1.2.3",
    compute_capabilities=("sm_89", "sm_120"),
    batch=BatchProfile(1, 2, 4),
    precision="bf16",
    strongly_typed=True,
    inputs=(TensorSpec("x", (-1, 1, 8, 8), "float32"), TensorSpec("t", (-1,), "int64")),
    outputs=(TensorSpec("output", (-1, 1, 8, 8), "float32"),),
    metadata={"stepfuse.kind": "denoiser", "name": "Zürich"},
    onnx_sha256="0" * 64,
    layers=(Layer("norm+silu", "kgen", ("a", "b")),),
    stepfuse_version="0.1.0",
)
PLAN = bytes(range(256)) * 5


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine file whose plan no library wrote."""
    write_engine(tmp_path / "unet.engine", INFO, PLAN)
    return tmp_path / "unet.engine"


def test_what_is_written_is_read(engine: Path) -> None:
    assert read_engine(engine) == (INFO, PLAN)
    assert read_info(engine) == INFO
    # the plan is the end of the file, as it came from the library
    assert engine.read_bytes().endswith(PLAN)


def test_truncated_anywhere(engine: Path) -> None:
    content = engine.read_bytes()
    for size in [*range(0, 60, 7), 100, 300, len(content) - len(PLAN), len(content) - 1]:
        engine.write_bytes(content[:size])
        with pytest.raises(BadEngineFile, match=r"truncated|is no stepfuse engine"):
            read_engine(engine)


def test_altered_anywhere(engine: Path) -> None:
    content = engine.read_bytes()
    for place in range(0, len(content), 41):
        wrong = bytearray(content)
        wrong[place] ^= 16
        engine.write_bytes(wrong)
        with pytest.raises(BadEngineFile):
            read_engine(engine)
    engine.write_bytes(content + b"more")
    with pytest.raises(BadEngineFile, match="too long"):
        read_engine(engine)


def test_a_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(b"ftrt" + PLAN)
    with pytest.raises(BadEngineFile, match="no stepfuse engine: it starts with b'ftrt"):
        read_engine(tmp_path / "plan")
    with pytest.raises(FileNotFoundError):
        read_engine(tmp_path / "missing")


def test_a_later_format(engine: Path) -> None:
    content = bytearray(engine.read_bytes())
    content[8] = 2
    engine.write_bytes(content)
    with pytest.raises(BadEngineFile, match="has format 2; accepted: 1"):
        read_info(engine)


def test_another_library(engine: Path) -> None:
    check_library(engine, INFO, "tensorrt_rtx", "1.2.3")
    for name, version in (("tensorrt", "1.2.3"), ("tensorrt_rtx", "1.2.4")):
        with pytest.raises(BadEngineFile, match=r"built by tensorrt_rtx 1\.2\.3 and runs with"):
            check_library(engine, INFO, name, version)


def test_an_empty_header_is_kept_too(tmp_path: Path) -> None:
    plain = replace(INFO, metadata={}, layers=(), compute_capabilities=())
    write_engine(tmp_path / "plain.engine", plain, b"")
    assert read_engine(tmp_path / "plain.engine") == (plain, b"")
