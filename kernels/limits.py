"""What a machine cannot do, said at once instead of by a crash minutes later."""

from __future__ import annotations

import os

MOST_THREADS = 256  # OpenMP keeps a team on the stack: some ten thousand threads end the process


def physical_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(what: str, size: int) -> None:
    """Raise ValueError where ``size`` bytes, the least that ``what`` needs, exceed the memory."""
    there = physical_memory()
    if there is not None and size > there:
        raise ValueError(
            f"{what} cannot fit: at least {size / 1e9:.4g} GB are needed, and this machine has "
            f"{there / 1e9:.4g} GB"
        )


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError for a seed of more than 64 bits, signed or not."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name} must fit in 64 bits; got {seed}")


def check_threads(name: str, count: int | None) -> None:
    """Raise ValueError for a number of threads that no thread pool takes."""
    most = max(MOST_THREADS, os.cpu_count() or 1)
    if count is not None and count < 1:
        raise ValueError(f"{name} must be at least 1; got {count}")
    if count is not None and count > most:
        raise ValueError(f"{name} must be in 1 .. {most}; got {count}")
