"""What is handed over by mistake, for every parameter of every public call.

A value has a label, by which a table says that it is no mistake there. Some are the same for all
parameters, others are made from the right value: its shape, its dtype or its device is wrong.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

NONE, FLAG, NUMPY_INTEGER, NUMPY_FLOAT = "None", "True", "a numpy integer", "a numpy float"

# values of types that no annotation mixes up with another; made anew, since some can be changed
_ALWAYS: dict[str, Callable[[], Any]] = {
    NONE: lambda: None,
    "a list": lambda: [1.0, 2.0],
    "an empty list": list,
    "a text": lambda: "text",
    "an empty text": str,
    "bytes": lambda: b"text",
    FLAG: lambda: True,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "-1": lambda: -1,
    "0": lambda: 0,
    "2 ** 70": lambda: 2**70,
    "1j": lambda: 1j,
    "an object": object,
    "a set": lambda: {1},
    "a dict": lambda: {"a": 1},
    "a class": lambda: int,
    "a tensor": lambda: torch.ones(2, 3),
    "an array": lambda: np.ones(2),
    "an integer dtype": lambda: torch.int64,
}


def values_for(valid: Any) -> dict[str, Callable[[], Any]]:
    """Label -> value, for a parameter whose right value is ``valid``."""
    return {**_ALWAYS, **_made_from(valid)}


def _made_from(valid: Any) -> dict[str, Callable[[], Any]]:
    if isinstance(valid, Tensor):
        made: dict[str, Callable[[], Any]] = {
            "of one axis more": lambda: valid[None].expand(2, *valid.shape).clone(),
            "without its first axis": lambda: valid.flatten()[0].clone(),
            "of twice the entries": lambda: torch.cat([valid.flatten(), valid.flatten()]),
            "without entries": lambda: valid.flatten()[:0].clone(),
            "as complex numbers": lambda: valid.to(torch.complex64),
            "as truth values": lambda: valid.bool(),
            "as a list": lambda: valid.tolist(),
            "as an array": lambda: valid.numpy(),
            "on the meta device": lambda: torch.empty_like(valid, device="meta"),
            "as a fake tensor": lambda: FakeTensorMode().from_tensor(valid),
        }
        if valid.is_floating_point():
            made["as integers"] = lambda: valid.to(torch.int64)
        else:
            made["as fractions"] = lambda: valid.to(torch.float32)
        return made
    if isinstance(valid, int) and not isinstance(valid, bool):
        return {NUMPY_INTEGER: lambda: np.int64(valid), "as a float": lambda: float(valid)}
    if isinstance(valid, float):
        return {NUMPY_FLOAT: lambda: np.float32(valid), "as a text": lambda: str(valid)}
    if isinstance(valid, Sequence) and not isinstance(valid, (str, bytes)):
        return {
            "as an iterator": lambda: iter(valid),
            "with None inside": lambda: [*valid[:-1], None],
            "with a text inside": lambda: [*valid[:-1], "text"],
            "with a fraction inside": lambda: [*valid[:-1], 1.5],
        }
    return {}


def accepted_by(parameter: inspect.Parameter) -> set[str]:
    """What the annotation lets through: None, a truth value, numpy's numbers."""
    kinds = _kinds(parameter.annotation)
    accepted = {NUMPY_INTEGER, NUMPY_FLOAT}
    if type(None) in kinds:
        accepted.add(NONE)
    if bool in kinds:
        accepted.add(FLAG)
    return accepted


def _kinds(annotation: Any) -> set[Any]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    if isinstance(annotation, str):  # not evaluated: its name is only there for a type checker
        words = {word.strip() for word in annotation.split("|")}
        known = {"None": type(None), "bool": bool}
        return {known.get(word, word) for word in words}
    return {annotation}


def labels(valid: Any) -> set[str]:
    """All that is tried where ``valid`` is right."""
    return set(values_for(valid))
