"""A Ray cluster of two machines that are network namespaces of this one, which root may make."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PORT = 6399
_SMALL = ("--disable-usage-stats", "--num-cpus=1")


@dataclass(frozen=True)
class Machine:
    """A namespace with an address of its own."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """That runs there."""
        return ["ip", "netns", "exec", self.name, *words]

    def processes(self) -> list[int]:
        """That are there."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def runs(self, method: str) -> bool:
        """Whether an actor is at it there, which Ray writes into the titles of processes."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                if title.startswith(b"ray::") and f".{method}".encode() in title:
                    return True
        return False

    def raylet(self) -> int:
        """The process that makes it a part of a cluster."""
        return next(
            pid for pid in self.processes() if Path(f"/proc/{pid}/comm").read_text() == "raylet\n"
        )


def reason_against() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need Linux, root and ip"
    name = f"stepfuse-{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except AssertionError as error:
        return f"no network namespace can be made: {error}"
    return ""


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Joined by a cable, and by nothing else, not with the rest of this machine either."""
    ends = [f"sf{os.getpid()}a", f"sf{os.getpid()}b"]
    machines = [
        Machine(f"stepfuse-{os.getpid()}-{i}", f"10.77.{os.getpid() % 250}.{i}") for i in (1, 2)
    ]
    with contextlib.ExitStack() as stack:
        for machine in machines:
            _ip("netns", "add", machine.name)
            stack.callback(_demolish, machine)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for machine, end in zip(machines, ends, strict=True):
            _ip("link", "set", end, "netns", machine.name)
            inside = ["-n", machine.name]
            _ip(*inside, "address", "add", f"{machine.address}/24", "dev", end)
            _ip(*inside, "link", "set", end, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield machines[0], machines[1]


def start_ray(machines: tuple[Machine, Machine], environment: dict[str, str]) -> str:
    """A cluster of one core each; its address."""
    head, other = machines
    address = f"{head.address}:{_PORT}"
    ray = str(Path(sys.executable).with_name("ray"))
    first = ["start", "--head", f"--port={_PORT}", f"--node-ip-address={head.address}"]
    first.append("--include-dashboard=false")
    second = ["start", f"--address={address}", f"--node-ip-address={other.address}"]
    for machine, words in ((head, first), (other, second)):
        _run(machine.command(ray, *words, *_SMALL), env=environment)
    return address


def _demolish(machine: Machine) -> None:
    for _ in range(20):
        left = machine.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            break
        time.sleep(0.1)
    _ip("netns", "delete", machine.name)


def _ip(*words: str) -> str:
    return _run(["ip", *words])


def _run(command: list[str], **options: Any) -> str:
    # what is written goes to a file: a daemon would keep a pipe open for ever
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
