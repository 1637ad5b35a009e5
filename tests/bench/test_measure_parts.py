"""The parts of a run: windows, joules, and processes that have just started."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.bench.hasty import launched

from stepfuse.bench import throughput
from stepfuse.bench.energy import Counter, NoCounter, energy, nvml, rapl
from stepfuse.bench.memory import cold_start
from stepfuse.bench.processes import ProcessFailed
from stepfuse.bench.record import Windows
from stepfuse.bench.workload import Spec

pytestmark = pytest.mark.usefixtures("hasty")


class Stub:
    """A loop that only says what is done to it."""

    draws = "philox"

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def prepare(self, steps: int) -> None: ...

    def wake(self) -> None:
        self.log.append(f"wake {self.name}")

    def images(self) -> Any:
        assert not gc.isenabled()
        self.log.append(self.name)


def test_a_loop_that_fills_a_window_is_not_run_again() -> None:
    log: list[str] = []
    loops: Any = {name: Stub(name, log) for name in ("short", "long")}
    latencies = {"short": [0.008, 0.009, 0.007], "long": [5.0, 6.0]}
    windows = {"short": Windows(2, 4, [], []), "long": Windows(2, 4, [], [])}
    throughput.throughput(loops, latencies, windows).run(5)
    assert (windows["long"].images, windows["long"].seconds) == ([2, 2], [5.0, 6.0])
    assert log == 5 * ["wake short", *3 * ["short"]]  # three of 8 ms fill 20 ms
    assert windows["short"].images == [6] * 5
    assert len(windows["short"].seconds) == 5


def powercap(folder: Path, packages: dict[str, tuple[int, int]]) -> Path:
    """A /sys/class/powercap: name -> microjoules, range."""
    folder.mkdir(exist_ok=True)
    for i, (name, (now, wraps)) in enumerate(packages.items()):
        zone = folder / f"intel-rapl:{i}"
        zone.mkdir(exist_ok=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text(f"{now}\n")
        (zone / "max_energy_range_uj").write_text(f"{wraps}\n")
    return folder


def test_rapl_adds_its_packages_up_and_wraps_each(tmp_path: Path) -> None:
    zones = {"package-0": (5_000_000, 10_000_000), "package-1": (9_000_000, 10_000_000)}
    folder = powercap(tmp_path / "powercap", {**zones, "psys": (77, 100)})
    found = rapl(folder)
    assert found.source == "RAPL package-0, package-1"
    before = found.joules()
    powercap(folder, {"package-0": (6_500_000, 10_000_000), "package-1": (500_000, 10_000_000)})
    assert found.since(before) == pytest.approx(1.5 + 1.5)


def test_why_there_is_no_energy(tmp_path: Path) -> None:
    with pytest.raises(NoCounter, match="is not there"):
        rapl(tmp_path / "missing")
    with pytest.raises(NoCounter, match="no RAPL package"):
        rapl(powercap(tmp_path / "other", {"psys": (1, 2)}))
    folder = powercap(tmp_path / "unreadable", {"package-0": (1, 2)})
    (folder / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(NoCounter, match="cannot be read"):
        rapl(folder)


def test_nvml_counts_millijoules() -> None:
    class Library:
        shown = 4000

        def nvmlInit(self) -> None: ...

        def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
            return index

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
            return self.shown

    library = Library()
    found = nvml(1, library)
    before = found.joules()
    library.shown = 10_000
    assert found.source == "NVML GPU 1"
    assert found.since(before) == pytest.approx(6.0)

    class Old(Library):
        def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
            raise RuntimeError("Not Supported")

    with pytest.raises(NoCounter, match="NVML: Not Supported"):
        nvml(0, Old())


def test_energy_is_by_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop costs 8 J here and makes 4 images."""
    monkeypatch.setattr("stepfuse.bench.energy.WINDOW_SECONDS", 0.003)
    shown = [0.0]

    class Costly(Stub):
        def images(self) -> Any:
            shown[0] += 8.0
            time.sleep(0.001)

    counter = Counter("pretended", lambda: list(shown), (100.0,))
    found = energy(Costly("a", []), 4, counter)
    assert found.joules_per_image == pytest.approx([2.0] * 3)
    assert (found.source, found.batch, found.reason) == ("pretended", 4, "")


def test_the_first_images_of_a_process_that_has_just_started(tiny: str) -> None:
    """Really started; memory of the parent, however much, is not in its peak."""
    held = bytearray(b"x") * (600 << 20)
    found = cold_start(Spec(tiny, steps=2, threads=1), "stepfuse-eager", 2, processes=1)
    assert len(held) == 600 << 20
    assert found.batch == 2
    assert 0 < found.imported_bytes[0] <= found.peak_bytes[0] < 600 << 20
    assert min(*found.import_seconds, *found.build_seconds, *found.first_seconds) > 0


def test_a_process_that_ends_early_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho starting; echo 'ImportError: libx.so' >&2; exit 3\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(ProcessFailed, match=r"^ImportError: libx\.so$"):
        cold_start(Spec(), "stepfuse", 1, processes=1)


def test_long_starts_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfuse.bench.memory.LONG", 0.0)
    found = cold_start(Spec(), "stepfuse", 1, 3, launched)
    assert found.peak_bytes == [3 << 20]
