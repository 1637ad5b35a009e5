"""The fixture ``backend`` runs a test on every backend, as `op_cases.across` parametrises it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # op_cases and triton_modes, which tests import

from op_cases import Mode, entered


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to pass as ``backend=``, inside whatever makes that backend take CPU tensors."""
    mode: Mode = request.param
    with entered(mode) as name:
        yield name
