"""Mistakes in calls: every parameter of every public callable, with values it was not made for.

A wrong type, rank, device or number is refused by a ValueError or TypeError that names the argument
and says what came, in this library's words; nothing is written, and the next call works. What is
public and which parameters there are is read from the package.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
from tests.api.case import Call, parameter_kind
from tests.api.listing import parameters, public_callables
from tests.api.table import CALLS, LEFT_OUT
from tests.api.values import accepted_by, values_for

PUBLIC = public_callables()
PARAMETERS = [
    (name, parameter) for name in CALLS if name in PUBLIC for parameter in parameters(PUBLIC[name])
]
LEAST_CASES = 300


@functools.cache
def call(name: str) -> Call:
    """The valid call of the table, made once."""
    return CALLS[name]()


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_public_callable_is_in_the_table() -> None:
    assert sorted({*CALLS, *LEFT_OUT}) == sorted(PUBLIC)
    assert not set(CALLS) & set(LEFT_OUT)


@pytest.mark.parametrize("name", CALLS)
def test_the_valid_call(name: str) -> None:
    """It works, and what the table says of parameters is said of some that exist."""
    found = call(name)
    found.run()
    known = {*parameters(PUBLIC[name]), *found.arguments}
    for said in (found.accepts, found.named, found.beside, found.instead, found.undefined):
        assert set(said) <= known


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_mistakes(name: str, parameter: str) -> None:
    found = call(name)
    found.run()
    kept = os.listdir()
    declared = parameters(PUBLIC[name])
    if parameter_kind(declared[parameter]) == "named rest":
        assert found.fault("nonsense", 1, accepted=False) == ""
        checked = [extra for extra in found.arguments if extra not in declared]
        accepted: set[str] = set()
    else:
        checked, accepted = [parameter], accepted_by(declared[parameter])
    for each in checked:
        faults = [
            f"{each} = {label} {fault}"
            for label, value, right in cases(found, each, declared.get(each), accepted)
            if (fault := found.fault(each, value(), right))
        ]
        assert not faults, "\n".join(faults)
    found.run()
    # where the path of a new file is asked for, "text" is one
    written = {"text"} if "a text" in found.accepts.get(parameter, ()) else set()
    assert set(os.listdir()) - {*kept} <= written


def cases(found: Call, parameter: str, declared: Any, accepted: set[str]) -> list[Any]:
    """(label, value, whether it is accepted) for one parameter."""
    valid = found.instead.get(parameter, found.arguments.get(parameter))
    if valid is None and declared is not None:
        valid = declared.default
    right = accepted | found.accepts.get(parameter, set())
    return [
        (label, value, label in right)
        for label, value in values_for(valid).items()
        if label not in found.undefined.get(parameter, ())
    ]


def test_there_are_enough_cases() -> None:
    count = sum(len(cases(call(n), p, None, set())) for n, p in PARAMETERS)
    assert count >= LEAST_CASES
