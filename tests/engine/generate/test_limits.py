"""Small disks, long runs, and what is written beside the images."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.engine.generate import case

import stepfuse as sf
from stepfuse.engine.generate.outcome import DISK
from stepfuse.engine.generate.reports.several import Silent
from stepfuse.engine.generate.work import run_shard


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs root, to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_is_74_and_what_is_there_is_whole(small_disk: Path) -> None:
    """Acceptance 5: no partial file under a final name; more room, and the run goes on."""
    run = small_disk / "run"
    words = case.options_of("plain", 160, run, "--workers", "2", "--format", "npy")
    words[words.index("--shard-size") + 1] = "40"
    words[words.index("webdataset")] = "npy"
    (small_disk / "ballast").write_bytes(bytes(200_000))
    ended = case.ran(*words, "--force")
    assert ended.returncode == 74, ended.stderr
    assert "No space left on device" in ended.stderr
    assert str(run) in ended.stderr
    assert case.hidden(run) == []
    (small_disk / "ballast").unlink()
    ended = case.ran(str(run), "--force")
    assert ended.returncode == 0, ended.stderr
    assert [r.count for r in case.reopened(run).records()] == [40] * 4


def test_a_disk_that_will_not_do_is_noticed_after_the_first_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = case.new_job(tmp_path / "run", 80)
    monkeypatch.setattr("stepfuse.engine.generate.place.LocalPlace.free", lambda self: 3 * 10_000)
    watcher = Silent()
    outcome = sf.generate(out=job.place.url, workers=1, watcher=watcher)
    assert outcome.status == DISK
    assert "shards like the first need" in outcome.reason
    assert 1 <= outcome.made < 10
    assert sf.generate(out=job.place.url, workers=1, force=True).status == 0


@pytest.mark.parametrize(("format", "bytes_each"), [("npz", 3 * 64), ("npy", 4 * 64)])
def test_arrays_that_will_not_fit_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, bytes_each: int
) -> None:
    """How large they are is known without a trial; 8x8 pixels in three colours, or as floats."""
    monkeypatch.setattr(
        "stepfuse.engine.generate.place.LocalPlace.free", lambda self: 100 * bytes_each
    )
    with pytest.raises(OSError, match="are to be written"):
        case.new_job(tmp_path / "run", 101, format=format)
    assert not (tmp_path / "run").exists()
    assert case.new_job(tmp_path / "run", 100, format=format).n == 100


def test_memory_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    """Acceptance 12: at shard 50 a worker holds no more than 20 MB beyond what it held at 5."""
    job = case.new_job(tmp_path / "run", 51 * 64, shard_size=64)
    seen = {}
    for k in range(51):
        run_shard(job, k)
        if k in (5, 50):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[k] = pages * resource.getpagesize()
    assert seen[50] <= seen[5] + 20e6


def test_logs_and_metrics_are_written(tmp_path: Path) -> None:
    log, metrics = tmp_path / "log.jsonl", tmp_path / "run.prom"
    words = case.options_of("plain", 21, tmp_path / "run", "--workers", "1")
    ended = case.ran(*words, "--log-json", str(log), "--metrics", str(metrics))
    assert ended.returncode == 0, ended.stderr
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events[0] == "begin"
    assert events.count("shard") == 3
    assert events[-1] == "end"
    assert events.count("end") == 1
    assert "stepfuse_images_total" in metrics.read_text()


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["--metrics", "run.txt"], 2, "prom"),
        (["--log-json", "nowhere/log"], 74, "nowhere"),
        (["--label", "9"], 2, "--label must be one of circle, square, 7"),
        (["--labels", "some"], 2, "--labels must be one of turn, random; got 'some'"),
        (["--conditions", "none.csv"], 2, "none.csv"),
        (["--shard", "2/2"], 2, "0 <= i < n; got 2/2"),
        (["--shard", "auto"], 2, "--shard auto finds none of"),
        (["--engine", "spark"], 2, "engine"),
        (["--device", "tpu"], 2, "--device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["--features", "nothing"], 2, "--features must be module:function; got 'nothing'"),
        (["--guidance", "nan"], 2, "--guidance must be finite"),
        (["--quality", "50"], 2, "quality"),
        (["--steps", "1000000"], 2, "steps"),
        (["--model", "no.such.module:f"], 2, "cannot import 'no.such.module'"),
        (["--model", "tests.engine.generate.models:FAULTY"], 2, "has no function 'FAULTY'"),
        (["--batch-size", "3"], 2, "--shard-size must be a multiple of --batch-size 3"),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    status: int,
    told: str,
) -> None:
    from stepfuse.engine.cli import run

    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(("SLURM", "AWS_BATCH", "JOB_COMP")):
            monkeypatch.delenv(name)
    words = case.options_of("plain", 8, tmp_path / "run", *more)
    assert run(["generate", *words]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert not (tmp_path / "run" / "shards").exists()
