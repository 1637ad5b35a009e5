"""What a benchmark runs on, for its record."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stepfuse._version import __version__
from stepfuse.bench.record import Machine
from stepfuse.engine.compile.timings import isa
from stepfuse.engine.generate.machine import processor, usable_cores

PACKAGES = ("triton", "diffusers", "onnx", "onnxruntime", "openvino", "numpy")
BUSY = 0.5  # processes that want a core before we start, per core: above, figures will scatter


def brief() -> dict[str, Any]:
    """What a figure depends on most, for files and captions of the scripts."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": isa(),
    }


def caption() -> str:
    """`brief` in a line."""
    return ", ".join(f"{k} {v}" for k, v in brief().items())


def describe(device: torch.device | None = None) -> Machine:
    """The machine as it is now; ``device`` is that of the network, the CPU by default."""
    return Machine(
        processor=processor(),
        device=_device(device or torch.device("cpu")),
        cores=_physical_cores(),
        logical_cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory(),
        isa=isa(),
        load=_load(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={"stepfuse": __version__, "torch": torch.__version__, **_versions()},
        commit=_commit(Path(__file__).resolve().parent),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def busy(machine: Machine) -> str:
    """A sentence for the notes where something else runs on the machine; empty otherwise."""
    if machine.load is None or machine.load <= BUSY * machine.logical_cores:
        return ""
    return (
        f"The machine was busy when this began: {machine.load:.1f} processes wanted its "
        f"{machine.logical_cores} cores. Times scatter and are too long; ratios less so."
    )


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _psutil() -> Any:
    """psutil, which the bench extra brings; None without it."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("psutil")
    return None


def _physical_cores() -> int | None:
    library = _psutil()
    cores: int | None = library.cpu_count(logical=False) if library else None
    return cores


def _memory() -> int | None:
    library = _psutil()
    if library:
        return int(library.virtual_memory().total)
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _load() -> float | None:
    with contextlib.suppress(AttributeError, OSError):
        return os.getloadavg()[0]
    return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit(folder: Path) -> str | None:
    """The commit of the tree ``folder`` lies in, "+" where it has changes; None outside of git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        # an installed wheel may lie inside somebody else's repository
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit
