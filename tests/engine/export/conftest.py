"""The embedded checkpoint as an ONNX file, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.export.onnx_case import build_once

import stepfuse as sf
from stepfuse.engine.export.to_onnx import loop_file
from stepfuse.engine.export.to_onnx import network_file as onnx_file


@pytest.fixture(scope="session")
def digits() -> sf.Checkpoint:
    """The embedded checkpoint."""
    return sf.load("digits")


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """`onnx` and `onnx_loop` build the graph of a network only once in all tests."""
    for module in (onnx_file, loop_file):
        monkeypatch.setattr(module, "build", build_once)
    return monkeypatch


@pytest.fixture(scope="session")
def digits_onnx(digits: sf.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`digits` as an ONNX file."""
    path = tmp_path_factory.mktemp("digits") / "digits.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "build", build_once)
        sf.export.onnx(digits, path, verify=False)
    return path
