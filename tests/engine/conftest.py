"""Checkpoints of tiny networks, and an empty folder to write to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.engine.cli.cli_case import TINY, save


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint: grey images, three classes."""
    return save(tmp_path_factory.mktemp("models") / "tiny.safetensors", TINY)


@pytest.fixture(scope="session")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint: colour, no classes, a learned variance."""
    config = replace(TINY, in_channels=3, num_classes=None, learned_variance=True)
    return save(tmp_path_factory.mktemp("models") / "rgb.safetensors", config)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory; and one thread, here and in processes started here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
