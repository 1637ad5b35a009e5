"""Several watchers in place of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.generate.reports_case import BEGUN, Clock, calls, in_many_orders

from stepfuse.engine.generate.reports.json_log import JsonLog
from stepfuse.engine.generate.reports.line import Line
from stepfuse.engine.generate.reports.lines import Lines
from stepfuse.engine.generate.reports.prometheus import Metrics
from stepfuse.engine.generate.reports.report import Report
from stepfuse.engine.generate.reports.several import Several, Silent
from stepfuse.engine.generate.watching import Watcher


class Noting:
    """Keeps what it is told, and the order in which several are."""

    def __init__(self, name: str, told: list[tuple[object, ...]]) -> None:
        self.name, self.told = name, told

    def __getattr__(self, name: str) -> object:
        return lambda *arguments: self.told.append((self.name, name, arguments))


class Tired(Report):
    """Ends badly."""

    def end(self) -> None:
        """Raise."""
        raise RuntimeError("tired")


def test_everything_is_passed_on_in_order() -> None:
    told: list[tuple[object, ...]] = []
    watcher = Several(Noting("a", told), Noting("b", told))
    for call in calls(watcher).values():
        call()
    assert [name for name, _, _ in told] == ["a", "b"] * 9
    assert told[0] == ("a", "begin", (BEGUN,))
    assert [call for name, call, _ in told if name == "b"] == [
        "begin", "up", "up", "made", "shard", "failed", "note", "tick", "end"
    ]  # fmt: skip
    assert told[10] == ("a", "failed", (13, 3, "ValueError: no", True))


def test_the_end_reaches_everybody() -> None:
    told: list[tuple[object, ...]] = []
    with pytest.raises(RuntimeError, match="tired"):
        Several(Noting("a", told), Tired(), Noting("b", told)).end()
    assert told == [("a", "end", ()), ("b", "end", ())]


def test_all_of_them_are_watchers(tmp_path: Path) -> None:
    clock = Clock()
    watchers: list[Watcher] = [
        Silent(),
        Report(clock),
        Line(None, clock),
        Lines(None, clock),
        JsonLog(tmp_path / "log.jsonl", clock=clock),
        Metrics(tmp_path / "run.prom", clock=clock),
    ]
    in_many_orders(Several(*watchers))
    in_many_orders(Several(Silent(), Several(*watchers)))
