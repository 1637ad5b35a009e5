"""One valid call of a public callable, what else it takes, and what an error must say."""

from __future__ import annotations

import inspect
import linecache
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stepfuse as sf

PACKAGE = str(Path(sf.__file__).parent)
HOMES = tuple(os.path.realpath(os.path.join(PACKAGE, name)) for name in ("kernels", "engine"))


@dataclass(frozen=True)
class Call:
    """A call that works.

    Attributes:
        function: what is called.
        arguments: of the valid call, by name.
        accepts: parameter -> labels of values (see `values`) that are no mistakes there.
        named: parameter -> other words by which an error may name it: an argument that it has to
            fit, or what the argument is the name of.
        beside: parameter -> arguments that it needs to mean something.
        instead: parameter -> its right value, where the valid call leaves it out.
        raises: documented errors besides ValueError, TypeError, BackendUnavailable and OSError.
        undefined: parameter -> labels for which nothing is promised, with the reason in a comment.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    accepts: Mapping[str, set[str]] = field(default_factory=dict)
    named: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    instead: Mapping[str, Any] = field(default_factory=dict)
    raises: tuple[type[Exception], ...] = ()
    undefined: Mapping[str, set[str]] = field(default_factory=dict)

    def run(self, **changes: Any) -> Any:
        """Call it, to the end of an iterator."""
        result = self.function(**{**self.arguments, **changes})
        return list(result) if isinstance(result, Iterator) else result

    def fault(self, parameter: str, value: Any, accepted: bool) -> str:
        """What is wrong about the outcome for one value; empty where it is right."""
        beside = self.beside.get(parameter, {})
        try:
            self.run(**{**beside, parameter: value})
        except Exception as error:
            if accepted:
                return f"is refused: {_said(error)}"
            return self._fault_of(parameter, error)
        return "" if accepted else "is accepted"

    def _fault_of(self, parameter: str, error: Exception) -> str:
        documented = (ValueError, TypeError, OSError, sf.BackendUnavailable, *self.raises)
        if not isinstance(error, documented):
            return f"gives an error from the depths: {_said(error)}"
        text = str(error)
        words = (parameter, *self.named.get(parameter, ()))
        if not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in words):
            return f"gives an error that does not name it: {_said(error)}"
        if "\n" in text or not _is_ours(error):
            return f"gives another library's words: {_said(error)}"
        return ""


def parameter_kind(parameter: inspect.Parameter) -> str:
    """ "one" argument, or the "rest" of the named or of the positional ones."""
    if parameter.kind is parameter.VAR_KEYWORD:
        return "named rest"
    return "positional rest" if parameter.kind is parameter.VAR_POSITIONAL else "one"


def _is_ours(error: Exception) -> bool:
    """Whether a ``raise`` in this package's files made the sentence."""
    if isinstance(error, OSError):
        return True  # the system's words, with the file's name
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = os.path.realpath(trace.tb_frame.f_code.co_filename)
    line = linecache.getline(file, trace.tb_lineno).strip()
    return file.startswith(HOMES) and line.startswith("raise ")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
