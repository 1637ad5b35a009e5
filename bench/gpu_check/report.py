"""gpu.md: what the checks found, to be read by people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEAD = ("card", "driver", "cuda", "torch", "triton", "python", "date", "commit")
_WIDEST = 120  # characters of a cell


def markdown(record: dict[str, Any]) -> str:
    """The whole page, from the record that gpu.json holds."""
    machine, checks = record["machine"], record["checks"]
    head = [(name, machine.get(name)) for name in _HEAD]
    if record["stand_in"]:
        head.insert(0, ("note", "the CPU stood in for a GPU: nothing here is a result of one"))
    overview = [
        (check["name"], check["status"], f"{check['seconds']:g}", _said(check)) for check in checks
    ]
    parts = [
        "# The CUDA path, checked",
        table(("", ""), head),
        f"{len(checks)} checks in {record['seconds']:g} s.",
        table(("check", "status", "s", ""), overview),
        *(_section(check) for check in checks),
    ]
    return "\n\n".join(parts) + "\n"


def _said(check: dict[str, Any]) -> str:
    """Why a check is not ok, in a cell."""
    wrong = check["wrong"]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return "; ".join(part for part in (check["reason"], wrong[0] + more if wrong else "") if part)


def _section(check: dict[str, Any]) -> str:
    """A check with its facts."""
    parts = [f"## {check['name']}: {check['status']}", check["about"]]
    if check["reason"]:
        parts.append(f"{check['status']}: {check['reason']}")
    if check["wrong"]:
        parts.append("\n".join(f"- {_line(wrong)}" for wrong in check["wrong"]))
    single = [(name, value) for name, value in check["facts"].items() if not _is_table(value)]
    if single:
        parts.append(table(("fact", "value"), single))
    for name, value in check["facts"].items():
        if _is_table(value):
            parts += [f"{name}:", _table_of(value)]
    if check["status"] in ("crashed", "timeout") and check["stderr"]:
        lines = "\n".join(check["stderr"])
        parts.append(f"The end of its standard error:\n\n````\n{lines}\n````")
    return "\n\n".join(parts)


def _is_table(value: Any) -> bool:
    """Whether a fact has rows: a dict, or a list of dicts."""
    rows = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    return bool(rows) or (isinstance(value, dict) and bool(value))


def _table_of(value: Any) -> str:
    if isinstance(value, dict):
        if all(isinstance(row, dict) for row in value.values()):
            return _table_of([{"": name, **row} for name, row in value.items()])
        return table(("", ""), list(value.items()))
    columns = list(dict.fromkeys(name for row in value for name in row))
    return table(columns, [[row.get(name, "") for name in columns] for row in value])


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        value = ", ".join(_cell(entry) for entry in value)
    text = _line(str(value)).replace("|", "\\|")
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"


def _line(text: str) -> str:
    return " ".join(text.split())
