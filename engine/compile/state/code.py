"""What can be read off Python code without running it."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

NOTHING = object()


def unwrapped(value: Any) -> tuple[Any, ...]:
    """What an attribute of a class or a file stands for: methods without their descriptors."""
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, property):
        return tuple(f for f in (value.fget,) if f is not None)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    return (value,)


def functions(value: Any) -> Iterator[types.FunctionType]:
    """The code of an attribute of a class: a method of any kind, or a property."""
    for inner in unwrapped(value):
        inner = getattr(inner, "__wrapped__", inner) if callable(inner) else inner
        if isinstance(inner, types.FunctionType):
            yield inner


def named_in(code: types.CodeType) -> Iterator[str]:
    """Every name in it, also in functions inside and as a string, for getattr."""
    yield from code.co_names
    stack: list[Any] = list(code.co_consts)
    while stack:
        constant = stack.pop()
        if isinstance(constant, types.CodeType):
            yield from named_in(constant)
        elif isinstance(constant, (tuple, frozenset)):
            stack += constant
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def content(cell: types.CellType) -> Any:
    """What a variable of a closure holds, `NOTHING` where it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return NOTHING
