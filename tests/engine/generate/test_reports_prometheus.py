"""`--metrics`: a file for node_exporter's textfile collector."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.engine.generate.reports_case import Clock, begun, in_many_orders, record, work

from stepfuse.engine.generate.reports import prometheus
from stepfuse.engine.generate.reports.meter import Meter
from stepfuse.engine.generate.reports.prometheus import Metrics, escaped, exposition

FILE = """\
# HELP stepfuse_images_total Images of the job whose shards are in place.
# TYPE stepfuse_images_total counter
stepfuse_images_total{job="run/"} 13000
# HELP stepfuse_images_per_second Images that the workers of this run finish now.
# TYPE stepfuse_images_per_second gauge
stepfuse_images_per_second{job="run/"} 20.0
# HELP stepfuse_shards_done Shards of the job that are in place.
# TYPE stepfuse_shards_done gauge
stepfuse_shards_done{job="run/"} 13
# HELP stepfuse_shards_failed Shards that this run has given up.
# TYPE stepfuse_shards_failed gauge
stepfuse_shards_failed{job="run/"} 1
# HELP stepfuse_shards_total Shards of the job.
# TYPE stepfuse_shards_total gauge
stepfuse_shards_total{job="run/"} 50
# HELP stepfuse_writer_wait_seconds Time for which sampling was held up by the writer, over all \
workers of this run.
# TYPE stepfuse_writer_wait_seconds counter
stepfuse_writer_wait_seconds{job="run/"} 1.5
# HELP stepfuse_worker_up Whether a worker of this run has loaded its network and runs.
# TYPE stepfuse_worker_up gauge
stepfuse_worker_up{job="run/",worker="0"} 1
stepfuse_worker_up{job="run/",worker="1"} 0
"""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.prom"


def test_the_file(clock: Clock, path: Path) -> None:
    metrics = Metrics(path, clock=clock)
    metrics.begin(begun())
    metrics.up(0, True)
    work(metrics, clock, 50, (20, 0))
    metrics.shard(0, record())
    metrics.failed(13, 3, "no", True)
    work(metrics, clock, 10, (20, 0))
    assert path.read_text() == FILE


def test_the_end_is_written(clock: Clock, path: Path) -> None:
    metrics = Metrics(path, clock=clock)
    metrics.begin(begun())
    metrics.up(0, True)
    work(metrics, clock, 51, (20, 0))
    metrics.shard(0, record())
    metrics.end()
    lines = path.read_text().splitlines()
    assert 'stepfuse_images_total{job="run/"} 13000' in lines
    assert 'stepfuse_images_per_second{job="run/"} 0' in lines
    assert 'stepfuse_worker_up{job="run/",worker="0"} 0' in lines


def test_it_is_written_every_few_seconds(
    clock: Clock, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []
    monkeypatch.setattr(prometheus, "write_file", lambda *_: times.append(round(clock.time, 3)))
    metrics = Metrics(path, clock=clock)
    metrics.begin(begun())
    work(metrics, clock, 12, (20, 20))
    metrics.shard(0, record(12))
    clock.go(3)
    metrics.shard(0, record(13))
    metrics.shard(0, record(14))
    metrics.end()
    assert times == [1000, 1005, 1010, 1015, 1015]


def test_who_reads_sees_a_whole_file(clock: Clock, path: Path) -> None:
    """A reader that has opened it goes on reading the old one; nothing else is left there."""
    metrics = Metrics(path, clock=clock)
    metrics.begin(begun())
    with path.open() as old:
        metrics.shard(0, record())
        metrics.end()
        assert 'stepfuse_images_total{job="run/"} 12000\n' in old.read()
    assert 'stepfuse_images_total{job="run/"} 13000\n' in path.read_text()
    assert os.listdir(path.parent) == ["run.prom"]
    assert path.stat().st_mode & 0o444


@pytest.mark.parametrize("name", ["run.txt", "run", "run.prom.tmp", "run.PROM", ".prom", ""])
def test_names_that_nobody_reads(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--metrics must end in \.prom.*; got '"):
        Metrics(tmp_path / name if name else "")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        Metrics(tmp_path / "missing" / "run.prom")
    (tmp_path / "folder.prom").mkdir()
    with pytest.raises(IsADirectoryError):
        Metrics(tmp_path / "folder.prom")


def test_later_failures_are_told_of_once(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    told: list[str] = []
    metrics = Metrics(folder / "run.prom", told.append, clock)
    folder.rmdir()
    in_many_orders(metrics)
    assert told == [f"--metrics {folder}/run.prom: not written: No such file or directory"]
    folder.mkdir()
    metrics.end()
    assert (folder / "run.prom").exists()


def test_without_anybody_to_tell_stderr_is(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    metrics = Metrics(folder / "run.prom", clock=clock)
    folder.rmdir()
    in_many_orders(metrics)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_any_order_of_calls(clock: Clock, path: Path) -> None:
    in_many_orders(Metrics(path, clock=clock))
    assert path.read_text().startswith("# HELP stepfuse_images_total ")


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ('a "b" c', r"a \"b\" c"),
        ("C:\\new", r"C:\\new"),
        ("two\nlines", r"two\nlines"),
        ('\\"\n', r"\\\"\n"),
        ("rün/", "rün/"),
    ],
)
def test_labels_are_escaped(url: str, label: str, clock: Clock, path: Path) -> None:
    assert escaped(url) == label
    metrics = Metrics(path, clock=clock)
    metrics.begin(begun(url=url))
    text = path.read_text(encoding="utf-8")
    assert f'stepfuse_images_total{{job="{label}"}} 12000\n' in text
    assert len(text.splitlines()) == 22


def test_a_path_that_is_no_text(clock: Clock, path: Path) -> None:
    """A label is UTF-8, or the whole file is refused."""
    metrics = Metrics(path, clock=clock)
    metrics.begin(begun(url=os.fsdecode(b"r\xfcn")))
    assert 'job="r\\\\udcfcn"' in path.read_text(encoding="utf-8")


def test_no_workers_and_many_images(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin(begun(images=2**60, images_done=2**60 - 1, workers=0))
    lines = exposition("run/", meter.read()).splitlines()
    assert 'stepfuse_images_total{job="run/"} 1152921504606846975' in lines
    assert lines[-1] == "# TYPE stepfuse_worker_up gauge"


def test_every_line_is_of_the_text_format(clock: Clock) -> None:
    """Help and type come first, and the samples of a metric follow each other."""
    meter = Meter(clock)
    meter.begin(begun(workers=64))
    lines = exposition("run/", meter.read()).splitlines()
    names = [line.split("{")[0] for line in lines if not line.startswith("#")]
    heads = [tuple(line.split()[1:3]) for line in lines if line.startswith("#")]
    assert list(dict.fromkeys(names)) == [name for kind, name in heads if kind == "TYPE"]
    assert heads == [(kind, name) for name in dict.fromkeys(names) for kind in ("HELP", "TYPE")]
    assert names == sorted(names, key=list(dict.fromkeys(names)).index)
