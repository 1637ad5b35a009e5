"""Energy of an image, where the machine counts it: RAPL for the processor, NVML for a GPU."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepfuse.bench.loops import Loop
from stepfuse.bench.record import Energy

POWERCAP = Path("/sys/class/powercap")
WINDOW_SECONDS = 1.0  # the counters move every millisecond, on some machines every 20
WINDOWS = 3


class NoCounter(Exception):
    """Why no energy can be measured here."""


@dataclass(frozen=True)
class Counter:
    """Counters of joules that are added up.

    Attributes:
        source: their names.
        joules: what each shows.
        wraps_at: joules at which each starts at 0 again; infinite where it does not.
    """

    source: str
    joules: Callable[[], list[float]]
    wraps_at: tuple[float, ...]

    def since(self, before: list[float]) -> float:
        """Joules since they showed ``before``, each at most one wrap ago."""
        pairs = zip(self.joules(), before, self.wraps_at, strict=True)
        return sum(now - then if now >= then else now - then + wrap for now, then, wrap in pairs)


def counter(device: torch.device, folder: Path = POWERCAP) -> Counter:
    """The counter of what runs the network. Raises `NoCounter` with the reason."""
    return nvml(device.index or 0) if device.type == "cuda" else rapl(folder)


def rapl(folder: Path = POWERCAP) -> Counter:
    """The sum over the processor packages."""
    if not folder.is_dir():
        raise NoCounter(
            f"{folder} is not there: no RAPL counter in this kernel, container or virtual machine"
        )
    zones = [
        zone
        for zone in sorted(folder.glob("*-rapl:*"))
        if (zone / "name").is_file() and (zone / "name").read_text().startswith("package")
    ]
    if not zones:
        raise NoCounter(f"{folder} has no RAPL package")
    files = [zone / "energy_uj" for zone in zones]

    def joules() -> list[float]:
        return [int(file.read_text()) / 1e6 for file in files]

    try:
        joules()
        ranges = [int((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in zones]
    except (OSError, ValueError) as error:
        raise NoCounter(f"the RAPL counter cannot be read ({error}); root can, as a rule") from None
    names = ", ".join((zone / "name").read_text().strip() for zone in zones)
    return Counter(f"RAPL {names}", joules, tuple(ranges))


def nvml(index: int, library: Any = None) -> Counter:
    """The GPU's own counter of millijoules (Volta and later), which does not wrap."""
    try:
        library = library or importlib.import_module("pynvml")
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByIndex(index)
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        raise NoCounter("pynvml is not there; pip install nvidia-ml-py") from None
    except Exception as error:  # its own error class, known only once it is imported
        raise NoCounter(f"NVML: {error}") from None

    def joules() -> list[float]:
        return [float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3]

    return Counter(f"NVML GPU {index}", joules, (math.inf,))


def energy(
    loop: Loop, batch: int, found: Counter, wait: Callable[[], Any] = lambda: None
) -> Energy:
    """Joules an image over windows of whole loops; ``wait`` returns when the device is idle."""
    result = Energy(found.source, batch)
    for _ in range(WINDOWS):
        before, start, images = found.joules(), time.perf_counter(), 0
        while images == 0 or time.perf_counter() - start < WINDOW_SECONDS:
            loop.images()
            wait()
            images += batch
        result.joules_per_image.append(found.since(before) / images)
    return result
