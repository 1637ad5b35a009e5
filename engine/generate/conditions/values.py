"""What the values of a row mean: the columns label, seed and guidance, and all the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from stepfuse.engine.generate.conditions.classes import Classes
from stepfuse.engine.generate.conditions.row import Row
from stepfuse.kernels.checks import as_number
from stepfuse.kernels.limits import check_seed

T = TypeVar("T")

LABEL, SEED, GUIDANCE = "label", "seed", "guidance"
COLUMNS = (LABEL, SEED, GUIDANCE)
_WHOLE_BATCH = ("steps", "eta")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")


def row_of(values: Mapping[str, Any], classes: Classes, labelled: bool) -> Row:
    """A row of a file as conditions.

    Args:
        values: by the names of their columns.
        classes: of the model.
        labelled: whether the file's rows have labels; without them `Row.label` is None.

    Raises ValueError that says which value is wrong and what is accepted.
    """
    for name in values:
        check_column(name)
    if (LABEL in values) != labelled:
        there, others = ("no", "have") if labelled else ("a", "lack")
        raise ValueError(
            f"has {there} label, which the rows before it {others}; accepted: one in every row, "
            "or in none"
        )
    return Row(
        label=_label(values[LABEL], classes) if labelled else None,
        seed=_seed(values.get(SEED)),
        guidance=_guidance(values.get(GUIDANCE), classes),
        extra={name: value for name, value in values.items() if name not in COLUMNS},
    )


@lru_cache(maxsize=1024)
def check_column(name: str) -> None:
    """Raise ValueError for a column that would not do what it seems to."""
    if not name.strip():
        raise ValueError(
            "has a column without a name, which pandas writes unless told index=False; "
            "accepted: a name for every column"
        )
    meant = name.strip().lower()
    if meant in _WHOLE_BATCH:
        raise ValueError(
            f"has a column {name!r}: the table of steps is the same for all images of a job, "
            f"so that none has steps or eta of its own; accepted columns: {', '.join(COLUMNS)} "
            "and others, which are passed through"
        )
    if meant in COLUMNS and name != meant:
        raise ValueError(f"has a column {name!r}; accepted: {meant!r}, in small letters")


def _label(value: Any, classes: Classes) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(
            f"label must be text or an integer: the name of a class, its number or none; "
            f"got {value!r:.100}"
        )
    # a number is read like its text, so that it means the same in every format
    return classes.number(str(value), "label")


def _seed(value: Any) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"seed must be an integer of 64 bits, or empty; got {value!r:.100}")
    _briefly(check_seed, SEED, value)
    return value - 2**64 if value >= 2**63 else value


def _guidance(value: Any, classes: Classes) -> float | None:
    if value is None or value == "":
        return None
    number = value
    if isinstance(value, str) and "_" not in value:
        try:
            number = float(value)
        except ValueError:
            number = value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"guidance must be a finite number, or empty; got {value!r:.100}")
    scale = _briefly(as_number, GUIDANCE, number)
    if scale != 1 and not classes.names:
        raise ValueError(
            f"guidance {scale:g} needs labels to be guided by, but the model has no classes; "
            "accepted: 1, or empty"
        )
    return scale


def _briefly(check: Callable[[str, Any], T], name: str, value: Any) -> T:
    """What a check of a number returns; an error has the number's first digits alone."""
    try:
        return check(name, value)
    except ValueError as error:
        raise ValueError(f"{error!s:.200}") from None
