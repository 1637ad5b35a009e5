"""What tests of compiled networks share."""

from __future__ import annotations

import pytest
from tests.engine.compile.emulated_graphs import EmulatedGraphs

from stepfuse.engine.compile import captured


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> EmulatedGraphs:
    """Networks on the CPU are captured, as they are on CUDA."""
    made = EmulatedGraphs()
    monkeypatch.setattr(captured, "GRAPHS", made)
    return made
