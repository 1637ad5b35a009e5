"""Starting a `child`, and hearing from it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

from stepfuse.engine.generate.order import DROP, Order

_WAIT = 10.0  # seconds for a child to end by itself


class Child:
    """A process and the pipe to it."""

    def __init__(self, order: Order, environment: dict[str, str] | None = None) -> None:
        ours, theirs = multiprocessing.Pipe()
        variables = {
            **os.environ,
            # read when PyTorch loads OpenMP; more threads than cores slow everything down
            "OMP_NUM_THREADS": str(order.threads),
            "MKL_NUM_THREADS": str(order.threads),
            **(environment or {}),
        }
        self.pipe: Connection = ours
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "stepfuse.engine.generate.child",
                str(theirs.fileno()),
                str(os.getpid()),
            ],
            env=variables,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _real(sys.stderr) else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the parent's
        )
        theirs.close()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            ours.send(order)

    def send(self, message: Any) -> None:
        """Tell it something; a child that is gone is noticed when it is read from."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(message)

    def heard(self) -> tuple[Any, ...] | None:
        """What it says, waiting for it; None where it is gone."""
        try:
            message: tuple[Any, ...] = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        return message

    def drop(self) -> None:
        """Let it end at once and remove what it has begun."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(DROP)

    def end(self) -> int:
        """Wait until it is gone, which closing the pipe asks for; its exit status."""
        self.pipe.close()
        try:
            return self.process.wait(_WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def death(self) -> str:
        """How it went, in words."""
        status = self.end()
        if status >= 0:
            return f"the worker's process ended with status {status}"
        name = signal.Signals(-status).name
        more = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"the worker's process was killed by {name}{more}"


def paths() -> tuple[str, ...]:
    """Where this process looks for modules; the working directory in place of ''."""
    return tuple(path or os.getcwd() for path in sys.path)


def _real(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
