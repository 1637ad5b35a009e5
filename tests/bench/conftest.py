"""A tiny checkpoint to time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.engine.cli.cli_case import TINY, save

from stepfuse.bench import measure, throughput, timing


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Grey images of 8x8, three classes, 100 training timesteps."""
    return save(tmp_path_factory.mktemp("models") / "tiny.safetensors", TINY)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses before a time is taken, short windows, and nothing collected between batches."""
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(throughput, "WINDOW_SECONDS", 0.02)
    monkeypatch.setattr(measure, "gc", SimpleNamespace(collect=lambda: 0))
