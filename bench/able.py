"""Who can take part in a benchmark on this machine: whatever raises is named and left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")
Say = Callable[[str], None]
_MOST = 300  # letters of a reason


def to_stderr(text: str) -> None:
    """Print a line, of whatever width the terminal has."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def able(makers: Mapping[str, Callable[[], T]], say: Say = to_stderr) -> dict[str, T]:
    """What each of ``makers`` returns, by name; ``say`` hears of those that raise, and why.

    To make should mean to run once: a library may refuse a dtype only then. AssertionError passes:
    a wrong result is no reason to go on without it.
    """
    found: dict[str, T] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except AssertionError:
            raise
        except Exception as error:  # of whatever library it is
            say(f"{name} left out: {described(error)}")
    return found


def described(error: Exception) -> str:
    """The kind of exception, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:_MOST]}" if lines else type(error).__name__
