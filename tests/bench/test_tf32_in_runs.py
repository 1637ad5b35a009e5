"""Everything of a run that computes images does so inside `tf32_off`, and the record says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.bench.hasty import Silent, launched

from stepfuse.bench import cold_start, measure, tf32
from stepfuse.bench.candidates import entry
from stepfuse.bench.machine import describe
from stepfuse.bench.measure import Bench, Plan
from stepfuse.bench.tf32 import NOTE
from stepfuse.bench.workload import Spec, Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Switch:
    """In the place of `tf32_off`: where it is entered, and for which devices."""

    def __init__(self) -> None:
        self.inside, self.devices = False, [CPU][:0]

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        self.inside = True
        self.devices.append(device)
        yield
        self.inside = False


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    found = Switch()
    monkeypatch.setattr(measure, "tf32_off", found)
    monkeypatch.setattr(tf32, "tf32_off", found)
    return found


@pytest.mark.usefixtures("hasty")
def test_a_run_builds_verifies_and_times_inside(tiny: str, switch: Switch) -> None:
    eager, seen = entry("stepfuse-eager"), []

    def build(workload: Workload, batch: int) -> Any:
        loop = eager.build(workload, batch)
        images = loop.images

        def watched() -> Any:
            seen.append(switch.inside)
            return images()

        loop.images = watched  # type: ignore[method-assign]
        seen.append(switch.inside)
        return loop

    workload = Workload(Spec(tiny, steps=2, optimize=False))
    plan = Plan((1, 2), rounds=1, processes=0)
    run = Bench(workload, [replace(eager, build=build)], plan, Silent(), launch=launched)
    record = run.run()
    assert len(seen) > 4
    assert all(seen)
    assert switch.devices == [CPU]
    assert NOTE not in record.notes


def test_a_record_of_a_gpu_says_so(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "describe", lambda _: describe(CPU))
    monkeypatch.setattr(measure, "timer_for", lambda _: (None, 0))
    workload = Workload(Spec(tiny, steps=2, optimize=False))
    workload.device = CUDA
    run = Bench(workload, [entry("stepfuse-eager")], Plan((1,)), Silent())
    assert NOTE in run.record.notes


def test_a_cold_start_too(tiny: str, switch: Switch) -> None:
    spec = {"model": tiny, "steps": 1, "optimize": False}
    cold_start.first_images({"spec": spec, "candidate": "stepfuse-eager", "batch": 1})
    assert switch.devices == [CPU]
