"""Who works: how many processes, on which cores or GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import torch

from stepfuse.engine.generate.machine import free_memory, groups, physical_cores, usable_cores

_MOST_ENCODERS = 8  # processes for one GPU


class DeviceMissing(ValueError):
    """A device that this machine does not have."""


@dataclass(frozen=True)
class Berth:
    """Where one worker runs.

    Attributes:
        cpus: cores of its own; empty for any.
        threads: of PyTorch.
        device: as the worker names it.
        environment: variables for its process.
    """

    cpus: tuple[int, ...]
    threads: int
    device: str = "cpu"
    environment: dict[str, str] = field(default_factory=dict)


class Crew(Sequence[Berth]):
    """The workers of a run on this machine."""

    def __init__(self, berths: Sequence[Berth]) -> None:
        self._berths = tuple(berths)

    def __len__(self) -> int:
        return len(self._berths)

    @overload
    def __getitem__(self, index: int) -> Berth: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Berth]: ...
    def __getitem__(self, index: int | slice) -> Berth | Sequence[Berth]:
        return self._berths[index]


def choose_crew(
    device: str, threads: int, workers: int | None = None, peak_bytes: int | None = None
) -> Crew:
    """On a CPU as many workers as there are groups of ``threads`` cores, and as fit into the memory
    if each needs ``peak_bytes``; on CUDA one for every GPU that is visible. ``workers`` overrides.
    """
    if device.startswith("cuda"):
        devices = [device] if ":" in device else _gpus()
        count = workers or len(devices)
        return Crew([Berth((), threads, devices[i % len(devices)]) for i in range(count)])
    if workers is None:
        workers = max(1, physical_cores() // threads)
        room = free_memory()
        if peak_bytes and room is not None:
            workers = max(1, min(workers, room // peak_bytes))
    return Crew([Berth(tuple(cpus), threads) for cpus in groups(workers, threads)])


def choose_encoders(device: torch.device) -> int:
    """How many processes encode images for one worker on this device.

    On a CPU none: a picture is encoded in a small part of the time that its network takes, and
    every core has a worker. On CUDA the cores that fall to one GPU, less the worker's own.
    """
    if device.type != "cuda":
        return 0
    return max(0, min(_MOST_ENCODERS, usable_cores() // len(_gpus()) - 1))


def resolve_device(name: str) -> str:
    """The device that "auto" stands for; `DeviceMissing` for one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceMissing(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; "
            "`stepfuse doctor` says more"
        )
    return name


def _gpus() -> list[str]:
    return [f"cuda:{i}" for i in range(max(1, torch.cuda.device_count()))]
