"""The fixture of the suites, and what their file says about the machine."""

from __future__ import annotations

from typing import Any

import pytest

from stepfuse.bench import machine, peers_setup
from stepfuse.bench.suite import Timed

peers_setup.prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suites."""
    parser.addoption("--rounds", type=int, default=21, help="blocks of calls, a benchmark")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Called by pytest-benchmark before it writes a file."""
    machine_info["stepfuse"] = machine.brief()


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timed:
    """Verify, then time: see `stepfuse.bench.suite`."""
    return Timed(benchmark, request.config.getoption("--rounds", default=21))


@pytest.fixture(scope="session")
def network(request: pytest.FixtureRequest) -> Any:
    """A U-Net by name with samplers over it and diffusers' twin: `bench_sampler.Network`."""
    pytest.importorskip("diffusers", reason="diffusers is the reference: pip install diffusers")
    from stepfuse.bench.bench_sampler import Network

    return Network(request.param)


NETWORKS = ("digits", "ddpm_cifar10")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Suites that take a network run for each, one after the other."""
    if "network" in metafunc.fixturenames:
        metafunc.parametrize("network", NETWORKS, indirect=True, scope="session")
