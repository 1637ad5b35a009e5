"""Times that were taken once, kept in a file, and given again wherever the same question is asked.

Which form of a layer a compiled network has is decided by trials. Two processes, or one under load,
may measure differently, choose differently and so differ in the last bits. With the times of one
process, replayed in all, every one decides as the first did:

    timings = Timings()
    with timings.recording():
        optimize(model, inputs)                     # measures, and notes what came out
    ...
    with Timings.from_json(timings.to_json()).replaying():
        optimize(model, inputs)                     # asks, measures nothing, decides the same
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch

from stepfuse._version import __version__
from stepfuse.kernels.arguments import check_literal
from stepfuse.kernels.checks import received

FORMAT = 1
Missing = Literal["error", "measure"]
Ask = Callable[[str, Callable[[], Any]], Any]
_asked: ContextVar[Ask | None] = ContextVar("_asked", default=None)


class TimingMissing(LookupError):
    """A trial whose result the `Timings` that are replayed do not have."""


class _Absent(BaseException):
    """Passes whatever catches the errors of a compiler's pass; `Timings.replaying` names it."""


class Timings:
    """Results of trials, by what was tried.

    Attributes:
        machine: what they hold for: instruction sets, versions of PyTorch and stepfuse.
        results: seconds, a number or a list of them, by the question: "module.function(arguments)".
            Threads are among the arguments. Infinity is an alternative that took no part.
    """

    def __init__(self) -> None:
        self.machine = here()
        self.results: dict[str, Any] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, in this thread, what trials give is noted, also where it was known before."""

        def ask(question: str, measure: Callable[[], Any]) -> Any:
            # the same for whoever asks again
            return self.results.setdefault(question, _plain(measure()))

        with _asking(ask):
            yield

    @contextlib.contextmanager
    def replaying(self, missing: Missing = "error") -> Iterator[None]:
        """Inside, in this thread, trials give what is noted here and measure nothing.

        With ``missing="measure"`` what is not noted is measured, and noted. Raises `TimingMissing`
        that names it otherwise, past everything that would take it for the failure of a pass.
        """
        check_literal("missing", missing, Missing)

        def ask(question: str, measure: Callable[[], Any]) -> Any:
            if question in self.results:
                return self.results[question]
            if missing == "error":
                raise _Absent(question)
            return self.results.setdefault(question, _plain(measure()))

        try:
            with _asking(ask):
                yield
        except _Absent as absent:
            raise TimingMissing(
                f"{absent} is not among the {len(self.results)} noted trials: they are of another "
                "model, batch or number of threads"
            ) from None

    def differences(self) -> dict[str, tuple[str, str]]:
        """What is not as it was where these were taken: name -> (there, here)."""
        now = here()
        names = sorted({*self.machine, *now})
        return {
            name: (self.machine.get(name, "?"), now.get(name, "?"))
            for name in names
            if self.machine.get(name) != now.get(name)
        }

    def to_json(self) -> str:
        """Text, in order of the trials, so that two can be compared by eye."""
        content = {
            "format": FORMAT,
            "machine": self.machine,
            "seconds": {name: _to_json(self.results[name]) for name in sorted(self.results)},
        }
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Timings:
        """Raises ValueError for a text that `to_json` did not write."""
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}; accepted: {FORMAT}")
            timings = cls()
            timings.machine = {str(name): str(v) for name, v in content["machine"].items()}
            timings.results = {
                str(name): _from_json(value) for name, value in content["seconds"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"these are no timings of trials: {error}") from None
        return timings


def here() -> dict[str, str]:
    """What this process's times hold for."""
    return {
        "isa": isa(),
        "aten": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "stepfuse": __version__,
    }


def isa() -> str:
    """The instruction set of our C++ kernels here, or "not built"."""
    try:
        from stepfuse.kernels.cpp import module
    except ImportError:
        return "not built"
    return str(module.isa)


def answer(function: Callable[..., Any], args: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
    """``measure()``, or what the `Timings` in force have for ``function(*args)``."""
    ask = _asked.get()
    if ask is None:
        return measure()
    words = ", ".join(map(_word, args))
    return ask(f"{function.__module__}.{function.__qualname__}({words})", measure)


def _word(value: Any) -> str:
    """An argument, the same in every process: functions by their names."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_word, value))})"
    if isinstance(value, functools.partial):
        return f"{_word(value.func)}{_word(value.args)}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"a trial's arguments must be numbers, words and functions; got {value!r}")


@contextlib.contextmanager
def _asking(ask: Ask) -> Iterator[None]:
    token = _asked.set(ask)
    try:
        yield
    finally:
        _asked.reset(token)


def _plain(value: Any) -> float | list[float]:
    return [float(v) for v in value] if isinstance(value, (tuple, list)) else float(value)


def _to_json(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_to_json(v) for v in value]
    return None if math.isinf(value) else value


def _from_json(value: Any) -> float | list[float]:
    if isinstance(value, list):
        return [float(_from_json(v)) for v in value]  # type: ignore[arg-type]
    if value is None:
        return math.inf
    if type(value) not in (int, float):
        raise ValueError(f"seconds must be numbers; got {received(value)}")
    return float(value)
