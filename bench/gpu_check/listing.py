"""The checks, in the order in which they run."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from stepfuse.bench.gpu_check.check import Check, Context, Group, Skipped

_CHECKS = "stepfuse.bench.gpu_check.checks"
_UNKNOWN_S = 60.0  # the limit of a check that could not be imported: its child shows why


@dataclass(frozen=True)
class Listed:
    """A check by the module that holds it, which is imported where it is needed.

    Args:
        name: of the check.
        group: the half of a run that it belongs to.
        module: has the `Check` as its ``CHECK``.
    """

    name: str
    group: Group
    module: str

    def load(self) -> Check:
        """The check; one that is skipped where there is no such module.

        Raises whatever the module raises when it is imported.
        """
        if importlib.util.find_spec(self.module) is None:
            return Check(self.name, self.group, 0.0, _not_built, "Not built.")
        check: Check = importlib.import_module(self.module).CHECK
        return check

    def described(self) -> Check:
        """The check for whoever does not run it: one that cannot be imported has a limit, too."""
        try:
            return self.load()
        except Exception as error:
            about = f"Cannot be imported: {type(error).__name__}."
            return Check(self.name, self.group, _UNKNOWN_S, _not_built, about)


def _not_built(context: Context) -> None:
    raise Skipped("not built")


def _listed(group: Group, *names: str) -> tuple[Listed, ...]:
    return tuple(Listed(name, group, f"{_CHECKS}.{name}") for name in names)


CHECKS: tuple[Listed, ...] = (
    *_listed(
        "correctness",
        "compile",
        "device",
        "ops",
        "graphs",
        "optimized",
        "pictures",
        "memory",
        "lint",
        "sanitizer",
    ),
    *_listed("speed", "kernels", "network", "loop", "counters"),
)
