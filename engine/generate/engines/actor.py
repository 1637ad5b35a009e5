"""What runs inside a Ray actor: one thread makes shards, another answers meanwhile."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from stepfuse.engine.files.owners import host
from stepfuse.engine.generate.making import Answer, Maker


class Dropped(BaseException):
    """The driver wants nothing more, at once."""


class Actor:
    """A `Maker` that says how far it is, and can be dropped, from another thread."""

    def __init__(self, threads: int, **order: Any) -> None:
        # Ray has set OMP_NUM_THREADS by then, to the CPUs that it counts for this actor
        torch.set_num_threads(threads)
        self._maker = Maker(**order)
        self._far = (-1, 0)
        self._thread: int | None = None

    def load(self) -> Answer:
        """Load the network: "ready", or "broken" with the name of this machine."""
        answer = self._maker.load()
        if answer[0] == "broken":
            _, kind, text, trace = answer
            return ("broken", kind, f"on {host()}: {text}", trace)
        return answer

    def make(self, k: int, attempt: int) -> Answer:
        """Make shard k: "done", "failed" or "dropped"."""

        def made(images: int) -> None:
            self._far = (k, self._far[1] + images)

        self._far, self._thread = (k, 0), threading.get_ident()
        try:
            return self._maker.make(k, attempt, made)
        except Dropped:
            return ("dropped", k)
        finally:
            self._thread = None

    def look(self) -> tuple[int, int]:
        """The shard that it is at, or was last, and how many of its images are finished."""
        return self._far

    def drop(self) -> None:
        """Raise `Dropped` where a shard is being made, so that what it has begun is removed."""
        if self._thread is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread), ctypes.py_object(Dropped)
            )


def remote_class() -> type:
    """A class for ``ray.remote`` that holds an `Actor`.

    It is made inside a function so that Ray sends the class itself, and not its name: a machine
    that finds stepfuse by the driver's paths alone must be told of them first.
    """

    class Remote:
        def __init__(self, paths: list[str], threads: int, order: dict[str, Any]) -> None:
            self.paths, self.threads, self.order = paths, threads, order

        def load(self) -> Any:
            import platform
            import sys

            sys.path.extend(path for path in self.paths if path not in sys.path)
            try:
                from stepfuse.engine.generate.engines.actor import Actor
            except ImportError as error:
                return ("broken", "other", f"on {platform.node()}: {error}", "")
            self.actor = Actor(self.threads, **self.order)
            return self.actor.load()

        def make(self, k: int, attempt: int) -> Any:
            return self.actor.make(k, attempt)

        def look(self) -> Any:
            return self.actor.look()

        def drop(self) -> None:
            self.actor.drop()

    return Remote
