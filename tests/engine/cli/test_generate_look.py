"""`stepfuse generate status`, `verify`, `merge` and `stats`: what is printed, and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.engine.cli.cli_case import arrays
from tests.engine.generate import look_case as case

from stepfuse.engine.cli import run
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.record import pack
from stepfuse.engine.generate.stats import stats
from stepfuse.engine.generate.work import note_failure


@pytest.fixture
def job(tmp_path: Path, tiny: str) -> Job:
    """Complete, with features."""
    return case.made_job(tmp_path / "run", tiny, features=case.FEATURES)


@pytest.fixture
def half(tmp_path: Path, tiny: str) -> Job:
    """The second of three shards is missing, and has failed."""
    job = case.made_job(tmp_path / "half", tiny)
    case.shard_path(job, 1).unlink()
    job.place.remove(job.record_name(1))
    note_failure(job, 1, "RuntimeError: [bold]too hot[/bold]", 3)
    return job


def look(what: str, job: Job, *words: str) -> int:
    """The command; its exit status."""
    return run(["generate", what, job.place.url, *words])


def test_the_words_are_commands_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("status", "verify", "merge", "stats"):
        assert run(["generate", word, "--help"]) == 0
        assert f"stepfuse generate {word}" in capsys.readouterr().out


def test_status_of_a_complete_job(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("status", job) == 0
    out = capsys.readouterr().out
    assert "images      21 of 21 (100 %)\n" in out
    assert "shards      3 of 3 of 8 images\n" in out
    assert "rows        turn, labels 0 1 2\n" in out
    assert "/s of one worker" in out
    assert "goes on" not in out


def test_status_of_half_a_job(half: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("status", half) == 0
    out = capsys.readouterr().out
    assert "images      13 of 21 (61.9 %)\n" in out
    assert "failed      shard 1: RuntimeError: [bold]too hot[/bold]\n" in out
    assert f"stepfuse generate {half.place.url} goes on" in out


def test_status_names_what_machines_differ_in(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    record = job.record(0)
    assert record is not None
    other = {**record.fingerprint, "isa": "other"}
    case.changed_record(job, 0, fingerprint=other, host="there")
    assert look("status", job) == 0
    out = capsys.readouterr().out
    assert "1 shard by there (1); isa other\n" in out
    assert "2 kinds of machines" in out
    assert "they differ in isa\n" in out


def test_status_as_json(half: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("status", half, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images_done"], found["shards_done"]) == (13, 2)


def test_status_of_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "status", str(tmp_path)]) == 2
    assert "holds no job" in capsys.readouterr().err


def test_verify_finds_nothing(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("verify", job, "-k", "21") == 0
    captured = capsys.readouterr()
    assert "21 images in 3 shards read; 21 made again, equal; no difference" in captured.out
    assert captured.err == ""


def test_verify_names_a_flipped_byte(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    path = case.shard_path(job, 1)
    content = dict(job.format.entries(path, 8))[11]
    case.flipped(path, path.read_bytes().index(content) + 50)
    assert look("verify", job, "-k", "0") == 4
    captured = capsys.readouterr()
    assert "image 11, shard 000001: other bytes than its record says\n" in captured.err
    assert "1 difference\n" in captured.out


def test_verify_shows_twenty_lines_at_most(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = case.made_job(tmp_path / "run", tiny, 40, shard_size=40)
    case.changed_record(job, 0, crc32=pack([0] * 40))
    assert look("verify", job, "-k", "0") == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 20 more"


def test_verify_says_what_is_missing(half: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("verify", half) == 3
    assert "1 shard missing: 1; no difference" in capsys.readouterr().out


def test_verify_of_moved_shards(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    for k in job.shards:
        case.shard_path(job, k).unlink()
    assert look("verify", job, "--full", "--records-only") == 0
    assert "3 records read; 21 made again, equal" in capsys.readouterr().out


def test_merge(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "all.npz"
    assert look("merge", job, "--npz", str(out)) == 0
    found = arrays(str(out))
    assert (found["arr_0"].shape, found["arr_0"].dtype) == ((21, 8, 8, 3), np.uint8)
    assert found["arr_1"].tolist() == [n % 3 for n in range(21)]
    for k in job.shards:
        first, _ = job.shards.span(k)
        for n, content in job.format.entries(case.shard_path(job, k), first):
            pixels = job.format.decode(content, (1, 8, 8))
            np.testing.assert_array_equal(found["arr_0"][n], np.repeat(pixels, 3, 2))
    printed = capsys.readouterr().out
    assert "21 images" in printed
    assert "rounded to the nearest grey level" in printed


def test_merge_replaces_nothing_unless_forced(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.npz"
    out.write_bytes(b"mine")
    assert look("merge", job, "--npz", str(out)) == 2
    assert "is there already; accepted: another name, or --force" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert look("merge", job, "--npz", str(out), "--force") == 0
    assert len(arrays(str(out))["arr_0"]) == 21


def test_merge_without_classes(tmp_path: Path, rgb: str) -> None:
    job = case.made_job(tmp_path / "run", rgb)
    out = tmp_path / "all.npz"
    assert look("merge", job, "--npz", str(out)) == 0
    assert list(arrays(str(out))) == ["arr_0"]


def test_merge_needs_all_shards(
    half: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert look("merge", half, "--npz", str(tmp_path / "all.npz")) == 2
    assert "lacks 1 of 3 shards" in capsys.readouterr().err
    assert not (tmp_path / "all.npz").exists()


def test_merge_needs_a_folder(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("merge", job, "--npz", str(tmp_path / "no" / "all.npz")) == 2
    assert "does not exist" in capsys.readouterr().err


def test_merge_of_samples_is_refused(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = case.made_job(tmp_path / "run", tiny, format="npy")
    assert look("merge", job, "--npz", str(tmp_path / "all.npz")) == 2
    assert "format npy holds samples" in capsys.readouterr().err


def test_merge_names_a_damaged_shard(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = case.shard_path(job, 1)
    content = dict(job.format.entries(path, 8))[11]
    case.flipped(path, path.read_bytes().index(content) + 50)
    assert look("merge", job, "--npz", str(tmp_path / "all.npz")) == 2
    assert "image 11" in capsys.readouterr().err
    assert not (tmp_path / "all.npz").exists()


def test_stats(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stats.npz"
    assert look("stats", job, "--out", str(out)) == 0
    found = stats(job)
    written = arrays(str(out))
    np.testing.assert_array_equal(written["mu"], found.mu)
    np.testing.assert_array_equal(written["sigma"], found.sigma)
    printed = capsys.readouterr().out
    assert "images      21\n" in printed
    assert "pixels      rounded to the nearest grey level; guided-diffusion truncates" in printed
    assert "distance" not in printed


def test_stats_beside_a_reference(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stats(job)
    np.savez(tmp_path / "ref.npz", mu=found.mu + np.array([3, 4, 0]), sigma=found.sigma)
    assert look("stats", job, "--reference", str(tmp_path / "ref.npz")) == 0
    assert "distance    25 (Frechet, squared)" in capsys.readouterr().out
    assert look("stats", job, "--reference", str(tmp_path / "none.npz")) == 2
    np.savez(tmp_path / "two.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert look("stats", job, "--reference", str(tmp_path / "two.npz")) == 2
    assert "is of 2 features, the job of 3" in capsys.readouterr().err


def test_stats_replaces_nothing_unless_forced(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "stats.npz"
    out.write_bytes(b"mine")
    assert look("stats", job, "--out", str(out)) == 2
    assert out.read_bytes() == b"mine"
    assert look("stats", job, "--out", str(out), "--force") == 0
    assert arrays(str(out))["mu"].shape == (3,)


def test_stats_without_features(half: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("stats", half) == 2
    assert "has no sums of features" in capsys.readouterr().err
