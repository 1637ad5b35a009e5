"""`--log-json`: a JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.engine.generate.reports_case import Clock, begun, in_many_orders, record, work

from stepfuse.engine.generate.reports.json_log import JsonLog
from stepfuse.engine.generate.reports.several import Several

NOON = 1_790_000_000.25  # 2026-09-21
TIME = "2026-09-21T14:13:20.250Z"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def log(path: Path | str, clock: Clock, **settings: Any) -> JsonLog:
    return JsonLog(path, clock=clock, now=lambda: NOON, **settings)


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_event_is_a_line(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    watcher = log(path, clock)
    watcher.begin(begun(url="rün/\n"))
    watcher.up(0, True)
    watcher.shard(0, record())
    watcher.failed(13, 1, "ValueError: no\nmore", False)
    watcher.note("a word")
    watcher.up(0, False)
    watcher.end()
    found = events(path)
    assert [event["event"] for event in found] == [
        "begin", "up", "shard", "failed", "note", "up", "end"
    ]  # fmt: skip
    assert {event["time"] for event in found} == {TIME}
    assert found[0] == {
        "time": TIME,
        "event": "begin",
        "url": "rün/\n",
        "images": 50_000,
        "shards": 50,
        "images_done": 12_000,
        "shards_done": 12,
        "shards_asked": 38,
        "images_asked": 38_000,
        "workers": 2,
        "threads": 1,
    }
    assert found[1] == {"time": TIME, "event": "up", "worker": 0, "running": True}
    assert found[2] == {
        "time": TIME,
        "event": "shard",
        "worker": 0,
        "shard": 12,
        "first": 12_000,
        "count": 1000,
        "bytes": 2_000_000,
        "sha256": "ab" * 32,
        "fingerprint": {"isa": "avx2"},
        "host": "node1",
        "seconds": 50.0,
        "writer_wait": 1.5,
        "attempt": 1,
        "images_per_s": 20.0,
    }
    assert found[3] == {
        "time": TIME,
        "event": "failed",
        "shard": 13,
        "attempt": 1,
        "error": "ValueError: no\nmore",
        "final": False,
    }
    assert found[4] == {"time": TIME, "event": "note", "text": "a word"}


def test_progress_every_half_a_minute(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    watcher = log(path, clock)
    watcher.begin(begun())
    watcher.up(0, True)
    work(watcher, clock, 50, (20, 0))
    watcher.shard(0, record())
    work(watcher, clock, 20, (20, 0))
    found = [event for event in events(path) if event["event"] == "progress"]
    assert len(found) == 2
    assert found[1] == {
        "time": TIME,
        "event": "progress",
        "images": 13_200,
        "images_in_place": 13_000,
        "images_wanted": 50_000,
        "images_per_s": 20.0,
        "mean_images_per_s": pytest.approx(1000 / 60, abs=1e-3),
        "workers": {"0": 20.0, "1": None},
        "eta_s": pytest.approx(36_800 / 20, abs=1),
        "seconds": 60.0,
        "writer_wait": 1.5,
        "writer_share": 0.03,
        "shards_done": 13,
        "shards_failed": 0,
        "shards": 50,
    }


def test_lines_are_there_at_once_and_appended(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for number in (1, 2):
        watcher = log(path, clock)
        watcher.begin(begun())
        assert len(events(path)) == 2 * number - 1
        watcher.end()
    assert [event["event"] for event in events(path)] == ["begin", "end"] * 2


def test_half_a_line_of_a_killed_run_is_ended(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"time": "20')
    watcher = log(path, clock)
    watcher.note("a word")
    watcher.note("another")
    watcher.end()
    first, *rest = path.read_text().splitlines()
    assert first == '{"time": "20'
    assert [json.loads(line)["event"] for line in rest] == ["note", "note", "end"]


def test_any_order_of_calls(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    in_many_orders(log(path, clock))
    assert {event["event"] for event in events(path)} == {
        "begin", "up", "shard", "failed", "note", "end"
    }  # fmt: skip


def test_a_file_that_cannot_be_opened(clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        log(tmp_path / "missing" / "log.jsonl", clock)
    with pytest.raises(IsADirectoryError):
        log(tmp_path, clock)
    with pytest.raises(OSError, match="No such file"):
        log("", clock)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_of_once(clock: Clock) -> None:
    told: list[str] = []
    watcher = log("/dev/full", clock, tell=told.append)
    in_many_orders(watcher)
    assert told == ["--log-json /dev/full: a line is lost: No space left on device"]


def test_who_is_told_may_tell_us(clock: Clock) -> None:
    everybody: list[Several] = []
    watcher = log("/dev/full", clock, tell=lambda sentence: everybody[0].note(sentence))
    everybody.append(Several(watcher))
    in_many_orders(everybody[0])


def test_without_anybody_to_tell_stderr_is(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    in_many_orders(log("/dev/full", clock))
    said = "--log-json /dev/full: a line is lost: No space left on device\n"
    assert capsys.readouterr().err == said


def test_it_goes_on_when_there_is_room_again(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line that fitted in is ended, so that only that one is lost."""
    path = tmp_path / "log.jsonl"
    told: list[str] = []
    watcher = log(path, clock, tell=told.append)

    class Tight:
        closed = False

        def write(self, content: bytes) -> int:
            if path.stat().st_size:
                raise OSError(28, "No space left on device")
            path.write_bytes(content[:10])
            return 10

        def close(self) -> None:
            self.closed = True

    room = watcher._appended._file
    monkeypatch.setattr(watcher._appended, "_file", Tight())
    watcher.note("lost")
    watcher.note("lost, too")
    monkeypatch.setattr(watcher._appended, "_file", room)
    watcher.note("kept")
    watcher.end()
    first, *rest = path.read_text().splitlines()
    assert first == '{"time": "'
    assert [json.loads(line)["event"] for line in rest] == ["note", "end"]
    assert len(told) == 1


def test_stdout(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    watcher = log("-", clock)
    watcher.note("a wörd")
    watcher.end()
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"time": TIME, "event": "note", "text": "a wörd"}
    assert json.loads(second)["event"] == "end"


def test_a_stdout_that_is_gone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    told: list[str] = []
    in_many_orders(log("-", clock, tell=told.append))
    assert told == ["--log-json -: a line is lost: there is no stdout"]


def test_the_time_is_utc(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    JsonLog(path, clock=clock, now=lambda: 0.0).note("")
    assert events(path)[0]["time"] == "1970-01-01T00:00:00.000Z"
