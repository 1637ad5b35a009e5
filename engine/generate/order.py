"""What a `child` is started for, and the signal that tells it to end at once."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

DROP = signal.SIGUSR2 if hasattr(signal, "SIGUSR2") else signal.SIGTERM


@dataclass(frozen=True)
class Order:
    """What a child is started for.

    Attributes:
        task: "shards", "encode" or "trial".
        paths: where modules are looked for, as the parent does.
        cpus: to run on; empty for any.
        threads: of PyTorch.
        device: of the network.
        arguments: of the task.
    """

    task: str
    paths: tuple[str, ...]
    cpus: tuple[int, ...]
    threads: int
    device: str
    arguments: dict[str, Any]
