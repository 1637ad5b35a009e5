"""Dataclasses from JSON, every field checked: a wrong one is named by its path."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def decode(kind: type[T], data: Any, where: str) -> T:
    """An instance of the dataclass ``kind`` from parsed JSON.

    Fields may be numbers, strings, booleans, Literals, dataclasses, lists and string-keyed dicts of
    those, each optionally None. Raises ValueError with the path of the field, ``where`` first.
    """
    result: T = _value(kind, data, where)
    return result


def _value(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _optional(kind, data, where)
    if origin is Literal:
        if data not in get_args(kind):
            raise _wrong(where, f"one of {', '.join(map(repr, get_args(kind)))}", data)
        return data
    if origin is list:
        if not isinstance(data, list):
            raise _wrong(where, "a list", data)
        (item,) = get_args(kind)
        return [_value(item, entry, f"{where}[{i}]") for i, entry in enumerate(data)]
    if origin is dict:
        if not isinstance(data, dict):
            raise _wrong(where, "an object", data)
        item = get_args(kind)[1]
        return {key: _value(item, entry, f"{where}[{key!r}]") for key, entry in data.items()}
    if dataclasses.is_dataclass(kind):
        return _fields(kind, data, where)
    return _scalar(kind, data, where)


def _optional(kind: Any, data: Any, where: str) -> Any:
    if data is None:
        return None
    (inner,) = (option for option in get_args(kind) if option is not type(None))
    return _value(inner, data, where)


def _scalar(kind: type, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise _wrong(where, names[kind], data)
    return data


def _fields(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(where, "an object", data)
    hints = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]!r}; accepted: {', '.join(known)}")
    given = {}
    for name, described in known.items():
        if name in data:
            given[name] = _value(hints[name], data[name], f"{where}.{name}")
        elif (
            described.default is dataclasses.MISSING
            and described.default_factory is dataclasses.MISSING
        ):
            raise ValueError(f"{where}.{name} is missing")
    return kind(**given)


def _wrong(where: str, accepted: str, data: Any) -> ValueError:
    shown = repr(data)
    return ValueError(
        f"{where} must be {accepted}; got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    )
