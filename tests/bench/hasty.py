"""What a benchmark reports to and starts, in the tests."""

from __future__ import annotations

from collections.abc import Callable

from stepfuse.bench.workload import Spec


class Silent:
    """A watch that remembers; ``at`` a stage it does something."""

    def __init__(self, at: str = "", action: Callable[[], None] = lambda: None) -> None:
        self.stages: list[str] = []
        self.said: list[str] = []
        self.at, self.action, self.ticks = at, action, 0

    def stage(self, text: str, total: int | None = None) -> None:
        self.stages.append(text)
        if self.at and self.at in text:
            self.action()

    def tick(self) -> None:
        self.ticks += 1

    def say(self, text: str) -> None:
        self.said.append(text)


def launched(spec: Spec, candidate: str, batch: int) -> dict[str, float]:
    """A process that was not started."""
    return {
        "import_seconds": 1.0,
        "build_seconds": 2.0,
        "first_seconds": 0.5,
        "peak_bytes": 3 << 20,
        "imported_bytes": 1 << 20,
    }
