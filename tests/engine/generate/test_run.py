"""Runs that are left alone, killed, stopped, poisoned; each ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.engine.generate import case

import stepfuse as sf
from stepfuse.engine.generate.job import Job


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of 96 images, made one shard after the other in this process."""
    job = case.new_job(tmp_path_factory.mktemp("jobs") / "run", 96, model=f"{case.MODELS}:slow")
    return case.make_all(job)


def _children(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except OSError:
        return []


def test_a_storm_of_kills_changes_nothing(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Parent and children are killed by turns, ten times and more, at moments of chance."""
    chance = random.Random(3)
    run = tmp_path / "run"
    words = case.options_of("slow", 96, run, "--workers", "2")
    kills = rounds = 0
    while kills < 10 and rounds < 60:
        rounds += 1
        process = case.start(*words)
        while kills < 10:
            time.sleep(chance.uniform(0.2, 1.2))
            children = _children(process)
            if process.poll() is not None:
                break
            if children and kills % 3 != 2:
                victim = chance.choice(children)
                os.kill(victim, signal.SIGKILL)
                kills += 1
            elif children or kills:
                process.kill()
                kills += 1
                break
        if process.poll() is None and kills < 10:
            process.kill()
        if kills < 10 and (run / "manifest.json").exists():
            (run / "records" / "000003.json").unlink()  # too quick: there must be work to disturb
        if kills < 10:
            process.communicate(timeout=60)
    process.communicate(timeout=120)
    final = case.ran(*words)
    assert final.returncode == 0, final.stderr
    assert kills == 10
    job = case.reopened(run)
    assert case.hashes(job) == undisturbed
    assert [(r.first, r.count) for r in job.records()] == [(8 * k, 8) for k in range(12)]
    assert case.hidden(run) == []
    assert not list((run / "failed").glob("*"))
    assert json.loads((run / "manifest.json").read_text())["images"] == 96


def test_sigterm_ends_with_75_and_the_next_run_goes_on(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    run = tmp_path / "run"
    process = case.start(*case.options_of("slow", 96, run, "--workers", "1", "--grace", "20"))
    _wait_for(run / "records", 1)
    process.terminate()
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert time.monotonic() - start < 20
    assert out.splitlines()[-1].startswith("stepfuse generate ")
    there = len(list((run / "records").glob("*.json")))
    assert 1 <= there < 12
    assert case.hidden(run) == []
    assert case.ran(str(run)).returncode == 0
    assert case.hashes(case.reopened(run)) == undisturbed


def test_ctrl_c_twice_leaves_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = case.options_of("slow", 4000, run, "--workers", "1")
    words[words.index("--shard-size") + 1] = "2000"  # seconds of work for each
    process = case.start(*words)
    _wait_for(run / "shards", 1, pattern=".*")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "goes on" in out
    assert case.hidden(run) == []
    assert not list((run / "records").glob("*"))


def _wait_for(folder: Path, count: int, pattern: str = "[0-9]*", seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"nothing came into {folder}"
        time.sleep(0.02)


@pytest.mark.parametrize("model", ["poison", "killer"])
def test_a_poison_image_is_tried_three_times_and_named(tmp_path: Path, model: str) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("label\n" + "\n".join("2" if n == 18 else "0" for n in range(32)) + "\n")
    run = tmp_path / "run"
    words = case.options_of(model, 32, run, "--workers", "1", "--conditions", str(table))
    ended = case.ran(*words)
    assert ended.returncode == 3, ended.stderr
    assert "shards 2" in ended.stderr
    job = case.reopened(run)
    assert [r.shard for r in job.records()] == [0, 1, 3]
    told = json.loads((run / "failed" / "000002.json").read_text())
    assert told["attempts"] == 3
    assert ("cannot be made" if model == "poison" else "SIGKILL") in told["error"]
    assert case.hidden(run) == []


def test_slices_and_a_third_that_overlaps_make_the_same(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    run = tmp_path / "run"
    words = case.options_of("slow", 96, run, "--workers", "1")
    asked = [["--shard", "0/2"], ["--shard", "1/2"], ["--shard", "1/3", "--steal"]]
    processes = [case.start(*words, *more) for more in asked]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    job = case.reopened(run)
    assert case.hashes(job) == undisturbed
    assert case.hidden(run) == []


def test_more_images_later_are_the_same_as_at_once(tmp_path: Path) -> None:
    once = case.make_all(case.new_job(tmp_path / "once", 30))
    job = case.new_job(tmp_path / "later", 21)
    case.make_all(job)
    raised = case.new_job(tmp_path / "later", 30)
    assert raised.n == 30
    assert sf.todo(raised) == [2, 3]
    assert case.make_all(raised) == once
    with pytest.raises(ValueError, match=r"cannot be lowered: .* has 30 images; got 29"):
        case.new_job(tmp_path / "later", 29)


def test_a_read_only_place_is_74_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = case.ran(*case.options_of("plain", 8, tmp_path / "file" / "run"))
    assert ended.returncode == 74
    assert "is not a folder" in ended.stderr


def test_other_settings_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job: Job = case.new_job(run, 8)
    assert job.n == 8
    ended = case.ran(*case.options_of("plain", 8, run, "--seed", "1", "--eta", "0.5"))
    assert ended.returncode == 2
    assert "seed: 0 there, 1 asked for" in ended.stderr
    assert "sampling.eta: 0.0 there, 0.5 asked for" in ended.stderr
