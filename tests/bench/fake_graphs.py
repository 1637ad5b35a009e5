"""A ``torch.cuda`` that captures calls of Python: what a replay would do, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FakeCuda:
    """Streams, devices and graphs by name in ``log``; a graph holds what ran while it was captured.

    Work says so by ``launched``, and is done at once, and again by every replay.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing: list[Any] | None = None
        api = self

        class Stream:
            def __init__(self, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                api.log.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list[Any] = []

            def replay(self) -> None:
                api.log.append("replay")
                for work in self.work:
                    work()

        self.Stream, self.CUDAGraph = Stream, CUDAGraph
        self.sync_mode = 0
        self._current = Stream("current")

    def launched(self, work: Any) -> None:
        """Run it; where a graph is captured, keep it for the replays."""
        self.log.append("captured" if self.capturing is not None else "launched")
        if self.capturing is not None:
            self.capturing.append(work)
        work()

    def waits(self) -> None:
        """Something that waits for the device."""
        if self.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def get_sync_debug_mode(self) -> Any:
        return self.sync_mode

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.sync_mode = mode

    def current_stream(self) -> Any:
        return self._current

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        self.log.append(f"on {device}")
        yield
        self.log.append(f"off {device}")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = graph.work
        try:
            yield
        finally:
            self.capturing = None
