"""What can be read off Python code without running it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any


def functions(value: Any) -> Iterator[types.FunctionType]:
    """The code of a class attribute: a method of any kind, or a property."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        yield from (f for f in (value.fget,) if isinstance(f, types.FunctionType))
    elif isinstance(value, types.FunctionType):
        yield value


def named_in(code: types.CodeType) -> Iterator[str]:
    """Every name in it, also in functions inside and as a string, for getattr."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from named_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


NOTHING = object()


def content(cell: types.CellType) -> Any:
    """What a variable of a closure holds, `NOTHING` where it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return NOTHING
