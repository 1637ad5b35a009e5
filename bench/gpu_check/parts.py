"""A check in parts: one that raises is wrong, and the next one runs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping

from stepfuse.bench.gpu_check.check import Context, Skipped


def each(context: Context, parts: Mapping[str, Callable[[], None]]) -> None:
    """Run the parts in their order and note the seconds of each.

    An exception is a line of what is wrong, with its traceback on the standard error; one after
    which the device can do nothing more in this process goes on.
    """
    seconds: dict[str, float | str] = {}
    for name, part in parts.items():
        began = time.perf_counter()
        context.note("running", name)
        try:
            part()
            context.synchronize()
        except Skipped as reason:
            seconds[name] = f"left out: {reason}"
        except Exception as error:
            if sticky(error):
                raise
            traceback.print_exc()
            context.expect(False, f"{name}: {in_a_line(error)}")
        seconds.setdefault(name, round(time.perf_counter() - began, 2))
        context.note("seconds", seconds)
    context.facts.pop("running", None)


def in_a_line(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def sticky(error: Exception) -> bool:
    """Whether the device can do nothing more in this process."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)
