"""The fixture of the suites, and what their file says about the machine."""

from __future__ import annotations

from typing import Any

import pytest

from stepfuse.bench import harness, peers_setup
from stepfuse.bench.suite import Timed

peers_setup.prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suites."""
    parser.addoption("--rounds", type=int, default=21, help="blocks of calls, a benchmark")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Called by pytest-benchmark before it writes a file."""
    machine_info["stepfuse"] = harness.machine()


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timed:
    """Verify, then time: see `stepfuse.bench.suite`."""
    return Timed(benchmark, request.config.getoption("--rounds"))
