"""A straight line of calls, written out as one Python function and compiled.

    def run(x, t):
        v0 = conv(x, w0, b0, ..., out=places[0])
        v1 = group_norm_silu(v0, w1, ...)
        del v0
        return (v1, )

Operators and whatever else has no text of its own are globals of the function, results die after
their last use, and those of operators that can be told where to put them lie in a memory planned
before (`MemoryPlan`). Beside the operators themselves nothing is left of anybody's Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepfuse.engine.replay.workspace import Call, MemoryPlan, Planned, Workspace, may_alias
from stepfuse.kernels.direct import blank, directly

_MAKERS = "_k_makers"  # among the globals: name of a source -> its lines -> who wrote them


@dataclass(frozen=True)
class Line:
    """``target = text``, or ``text`` alone where there is no target; ``by`` names who wrote it."""

    target: str
    text: str
    call: Call
    by: str

    def written(self, place: str = "") -> str:
        """The line; ``place`` is the text of where its result shall lie."""
        text = f"{self.text.removesuffix(')')}, out={place})" if place else self.text
        return f"{self.target} = {text}" if self.target else text


class Writer:
    """Takes calls down, one after the other, and makes a function of them.

    Args:
        bound: becomes the function's globals; other names in it may be bound anew at any time.
        named: the variable or global that a value is known by, None for a value that has none.
    """

    def __init__(self, bound: dict[str, Any], named: Callable[[Any], str | None]) -> None:
        self.lines: list[Line] = []
        self._bound, self._named = bound, named
        self._sources: dict[str, dict[int, str]] = bound.setdefault(_MAKERS, {})

    @property
    def parts(self) -> int:
        """How many functions have these globals."""
        return len(self._sources)

    def call(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        reads: Sequence[str],
        makes: Sequence[str],
        target: str,
        result: Any,
        by: str = "",
    ) -> None:
        """Add the line ``target = function(*args, **kwargs)``.

        Of its names ``reads`` are read and ``makes`` are new; ``result`` is like what it makes.
        """
        like = blank(function, result) if makes else None
        if function is operator.getitem:
            text = f"{self.text(args[0])}[{args[1]!r}]"
        else:
            parts = [self.text(arg) for arg in args]
            parts += [f"{name}={self.text(value)}" for name, value in kwargs.items()]
            text = f"{self._bind(directly(function))}({', '.join(parts)})"
        aliases = like is None and may_alias(function)
        self.lines.append(Line(target, text, Call(makes, reads, aliases, like), by))

    def text(self, value: Any) -> str:
        """An expression for a value."""
        name = self._named(value)
        if name is not None:
            return name
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{self.text(part)}, " for part in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return self._bind(value)

    def function(
        self,
        name: str,
        source: str,
        inputs: Sequence[str] = (),
        results: Sequence[str] | None = None,
        memory: Workspace | None = None,
    ) -> Callable[..., Any]:
        """Compile the lines to a function of ``inputs`` that returns ``results`` as a tuple.

        Without ``results`` it returns nothing. ``source`` stands for its file in a traceback.
        ``memory`` is for results whose place is planned, taken at the first call; without it none
        is.
        """
        kept = frozenset(results or ())
        plan = MemoryPlan([line.call for line in self.lines] if memory is not None else [], kept)
        arguments, places = list(inputs), dict.fromkeys(plan.index, "")
        if places:
            arguments.append("_k_places")
            places = {made: f"_k_places[{i}]" for made, i in plan.index.items()}
        body, self._sources[source] = self._body(inputs, kept, places)
        if results is not None:
            body.append(f"return ({''.join(f'{result}, ' for result in results)})")
        text = f"def {name}({', '.join(arguments)}):\n"
        text += "".join(f"    {line}\n" for line in body or ["pass"])
        exec(compile(text, source, "exec"), self._bound)
        run: Callable[..., Any] = self._bound.pop(name)
        return Planned(run, plan, memory) if memory is not None and places else run

    def _body(
        self, inputs: Sequence[str], kept: frozenset[str], places: Mapping[str, str]
    ) -> tuple[list[str], dict[int, str]]:
        """The lines, names deleted after their last use, and who wrote which line of the source."""
        last = {name: i for i, line in enumerate(self.lines) for name in line.call.reads}
        made = set(inputs)
        body: list[str] = []
        makers: dict[int, str] = {}
        for i, line in enumerate(self.lines):
            makes = line.call.makes
            body.append(line.written(places.get(makes[0], "") if makes else ""))
            makers[len(body) + 1] = line.by
            made.update(makes)
            met = made.intersection(line.call.reads).union(makes)
            dead = sorted(name for name in met if last.get(name, i) == i and name not in kept)
            if dead:
                body.append(f"del {', '.join(dead)}")
        return body, makers

    def _bind(self, value: Any) -> str:
        name = f"_k{id(value)}"  # no two living objects share it, and the globals keep them alive
        self._bound[name] = value
        return name


def maker(error: BaseException) -> str:
    """Who wrote the line in which a function made here failed, "" where it is unknown."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        makers = frame.f_globals.get(_MAKERS, {}).get(frame.f_code.co_filename, {})
        found = makers.get(trace.tb_lineno, found)
        trace = trace.tb_next
    return found
