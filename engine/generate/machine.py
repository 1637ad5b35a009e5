"""The machine a worker runs on: how many cores it may use, and what its last bits depend on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepfuse.engine.compile.timings import here
from stepfuse.kernels.limits import physical_memory

_CGROUPS = Path("/sys/fs/cgroup")
_ENOUGH = 0.8  # of the memory that is free


def usable_cores() -> int:
    """Cores of this process: of its affinity, and no more than its cgroup gives it the time of."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota + 1e-6)))


def physical_cores() -> int:
    """Of `usable_cores`, those that do not share a core with another one."""
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return usable_cores()
    siblings = set()
    for cpu in affinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text(encoding="ascii").strip())
        except OSError:
            siblings.add(str(cpu))
    return max(1, min(len(siblings), usable_cores()))


def groups(workers: int, threads: int) -> list[list[int]]:
    """CPUs for each of ``workers``, ``threads`` each, of one NUMA node where one is large enough.

    Workers beyond the CPUs that are there have no CPUs of their own: an empty list.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return [[] for _ in range(workers)]
    free = _by_node(sorted(affinity(0)))
    found: list[list[int]] = []
    for _ in range(workers):
        node = max(free, key=len)
        if len(node) < threads:
            found.append([])
            continue
        found.append(node[:threads])
        del node[:threads]
    return found


def free_memory() -> int | None:
    """Bytes that new processes may count on: of the machine, and of the cgroup; None if unknown."""
    limits = [_available(), _cgroup_room()]
    known = [limit for limit in limits if limit is not None]
    return int(_ENOUGH * min(known)) if known else None


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[-1] if names else platform.processor()


def fingerprint(device: torch.device, threads: int, libraries: Mapping[str, str]) -> dict[str, str]:
    """What a shard's bytes may depend on beside the job; ``libraries`` are those of its format.

    Records of one fingerprint must agree byte for byte; of two, up to rounding.
    """
    found = {
        **here(),
        "processor": processor(),
        "threads": str(threads),
        "device": str(device.type),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", "default"),
        **libraries,
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    return found


def short(found: dict[str, Any]) -> str:
    """Eight letters for a fingerprint."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]


def _quota() -> float | None:
    """Cores' worth of time that the cgroup gives, the least on the way up."""
    found = []
    for folder in _own_cgroups():
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            found.append(int(quota) / int(period))
        except (OSError, ValueError):  # "max", or no such file
            continue
    try:  # the first version of cgroups
        quota_us = int((_CGROUPS / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii"))
        period_us = int((_CGROUPS / "cpu/cpu.cfs_period_us").read_text(encoding="ascii"))
        if quota_us > 0:
            found.append(quota_us / period_us)
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _cgroup_room() -> int | None:
    found = []
    for folder in _own_cgroups():
        try:
            most = int((folder / "memory.max").read_text(encoding="ascii"))
            used = int((folder / "memory.current").read_text(encoding="ascii"))
            found.append(max(0, most - used))
        except (OSError, ValueError):
            continue
    return min(found, default=None)


def _own_cgroups() -> list[Path]:
    """The folders of this process's cgroup and of those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line.partition("::")[2] for line in lines if line.startswith("0::")), "/")
    place = _CGROUPS / own.strip("/")
    return [place, *(p for p in place.parents if p.is_relative_to(_CGROUPS))]


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return physical_memory()
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return physical_memory()


def _by_node(cpus: list[int]) -> list[list[int]]:
    """CPUs in groups that share memory; all in one where the system does not say."""
    nodes: dict[str, list[int]] = {}
    for cpu in cpus:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}")
        node = next((p.name for p in folder.glob("node[0-9]*")), "")
        nodes.setdefault(node, []).append(cpu)
    return list(nodes.values())
