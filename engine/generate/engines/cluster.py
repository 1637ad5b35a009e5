"""A Ray cluster: joined where there is one, begun on this machine where none is named.

Ray is imported by the functions, since it takes seconds and need not be there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

_STORE = 80_000_000  # bytes, about the least that Ray takes: no image goes through its store
_PATIENCE = 10.0  # seconds for an address to answer
_LOCAL = "local"


def require_ray() -> Any:
    """The module; ValueError that says how it is installed."""
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            f"--engine ray needs Ray ({error}): pip install 'stepfuse[ray]'"
        ) from error
    return ray


@contextlib.contextmanager
def reached(address: str | None) -> Iterator[None]:
    """Inside, a cluster that has to be there is joined; one of our own is not begun yet.

    Raises ValueError where Ray is missing, or the cluster does not answer or does not let us in.
    """
    require_ray()
    if chosen(address) == _LOCAL:
        yield
        return
    with joined(address, cpus=0):
        yield


@contextlib.contextmanager
def joined(address: str | None, cpus: int) -> Iterator[None]:
    """Inside, this process belongs to the cluster; raises as `reached` does.

    A process that belongs to one already stays in it: a connection is ended only by whoever began
    it. Without an address, in RAY_ADDRESS neither, a cluster of one machine with ``cpus`` is begun.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield
        return
    _join(ray, chosen(address), cpus)
    try:
        with _hushed(ray):
            yield
    finally:
        ray.shutdown()


def chosen(address: str | None) -> str:
    """The address that is meant: given, in RAY_ADDRESS as `ray job submit` sets it, or none."""
    return address or os.environ.get("RAY_ADDRESS") or _LOCAL


def room(cpus: int, gpus: int) -> int:
    """How many workers with so many CPUs and GPUs the nodes have, whoever uses them now."""
    ray = require_ray()
    found = 0
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            slots = [there.get("CPU", 0) // cpus, *([there.get("GPU", 0) // gpus] if gpus else [])]
            found += int(min(slots))
    return found


def _join(ray: Any, address: str, cpus: int) -> None:
    own: dict[str, Any] = {}
    if address == _LOCAL:
        own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE}
    elif ":" in address and "://" not in address:
        _knock(address)
    try:
        with _signals_kept():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError, AssertionError) as error:
        ray.shutdown()
        raise ValueError(_refused(address, error)) from error


def _knock(address: str) -> None:
    """Raise ValueError where nobody listens, which Ray would find out in minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(_refused(address, error)) from error


def _refused(address: str, error: BaseException) -> str:
    said = " ".join(str(error).split())
    cause: BaseException | None = error
    while cause is not None:
        if "uthentication token" in str(cause) or "InvalidAuthToken" in str(cause):
            said = "the token here is missing or not that of the cluster"
        cause = cause.__cause__ or cause.__context__
    return (
        f"cannot join the Ray cluster at --address {address}: {said}. Accepted: HOST:PORT that "
        "`ray start --head` has printed, or auto on one of its machines; a cluster that asks for a "
        "token, as Ray's do by default, needs RAY_AUTH_MODE=token and its token here, in "
        "RAY_AUTH_TOKEN or ~/.ray/auth_token"
    )


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; it is ours again afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _hushed(ray: Any) -> Iterator[None]:
    """Inside, Ray does not write to stdout what its machines say of their end, which is ours.

    ``log_to_driver`` does not reach these lines; they would end up between those of ``--log-json``.
    """
    worker = ray._private.worker
    if not hasattr(worker, "print_to_stdstream"):  # no public name
        yield
        return
    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *told, **more: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before
