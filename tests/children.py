"""Processes that a process has started, on Linux."""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> list[int]:
    """Of a process, those of its main thread that run."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed if runs(int(child))]


def runs(pid: int) -> bool:
    """Whether it is there, and no zombie that nobody has asked about."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
