"""The fixture ``backend`` runs a test on every backend, as `op_cases.across` parametrises it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # op_cases and triton_modes, which tests import

from op_cases import Mode, entered


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to pass as ``backend=``, inside whatever makes that backend take CPU tensors."""
    mode: Mode = request.param
    with entered(mode) as name:
        yield name


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Every tensor PyTorch leaves uninitialised is NaN: results and scratch memory of ours too."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
