"""What a check of the CUDA path is given, and what it says.

A check runs in a process of its own. It notes facts as it goes, so that those of a check that hangs
or crashes are known up to there, and it goes on after a wrong result: one run on a lent GPU should
show everything that is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

Group = Literal["correctness", "speed"]
T = TypeVar("T")


class Skipped(Exception):
    """The check cannot be done here; the message says what it needs."""


@dataclass
class Context:
    """Where a check runs, and what it found so far.

    Args:
        device: "cuda", or "cpu" where a stand-in exercises the check's own code.
        limit_s: seconds after which the check is killed.
        changed: is called with this context after every note.
    """

    device: torch.device
    limit_s: float = 600.0
    changed: Callable[[Context], None] = lambda context: None
    facts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def stands_in(self) -> bool:
        """Whether there is no GPU, and small sizes show that the check's own code runs."""
        return self.device.type != "cuda"

    @property
    def seconds_left(self) -> float:
        """Before the check is killed; one that repeats a measurement stops in time."""
        return self.limit_s - (time.monotonic() - self.started)

    def sized(self, real: T, small: T) -> T:
        """``real`` on a GPU, ``small`` where the CPU stands in."""
        return small if self.stands_in else real

    def note(self, name: str, value: Any) -> None:
        """Keep a fact, of JSON's types; one of the same name is replaced."""
        self.facts[name] = value
        self.changed(self)

    def expect(self, holds: bool, otherwise: str) -> bool:
        """Note ``otherwise`` as wrong where something does not hold, and go on."""
        if not holds:
            self.wrong.append(otherwise)
            self.changed(self)
        return holds

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.stands_in:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: in files and on the command line.
        group: of the two halves of a run.
        limit_s: seconds it may take on a GPU.
        run: does it; raises `Skipped` where it cannot be done.
        about: what it shows, in one sentence.
    """

    name: str
    group: Group
    limit_s: float
    run: Callable[[Context], None]
    about: str
