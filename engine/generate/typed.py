"""Options checked against their annotations, with errors in the command's words."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stepfuse.kernels.arguments import as_list, check_kind, check_literal, check_text
from stepfuse.kernels.checks import as_integer, as_number, check_flag


def option(name: str) -> str:
    """What a field is called on the command line: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def settle(instance: Any) -> None:
    """Give every field of a frozen dataclass the type of its annotation, where its value is one.

    Integers may be NumPy's and numbers integers, a list of texts becomes a tuple. Raises TypeError
    or ValueError that names the option, the value and what is accepted.
    """
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        value = _settled(option(field.name), getattr(instance, field.name), hints[field.name])
        object.__setattr__(instance, field.name, value)


def _settled(name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    if kind is int:
        return as_integer(name, value)
    if kind is float:
        return as_number(name, value)
    if kind is bool:
        check_flag(name, value)
        return bool(value)
    if kind is str:
        check_text(name, value)
        return value
    if get_origin(kind) is Literal:
        check_literal(name, value, kind)
        return value
    if get_origin(kind) is tuple:
        texts = as_list(name, value, "a list of texts")
        for text in texts:
            check_text(name, text)
        return tuple(texts)
    check_kind(name, value, kind, kind.__name__)
    return value
