"""What `status` sees in the folder of a job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.engine.generate import look_case as case

from stepfuse.engine.files.owners import host
from stepfuse.engine.generate.claims import Claim
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.status import status
from stepfuse.engine.generate.work import note_failure, run_shard


@pytest.fixture
def job(tmp_path: Path, tiny: str) -> Job:
    """Of three shards, of which the second and the last, 13 images, are made."""
    job = case.new_job(tmp_path / "run", tiny)
    run_shard(job, 1)
    run_shard(job, 2)
    return job


def test_what_is_done_is_counted(job: Job) -> None:
    found = status(job)
    assert (found.images, found.images_done, found.shards, found.shards_done) == (21, 13, 3, 2)
    sizes = [case.shard_path(job, k).stat().st_size for k in (1, 2)]
    assert found.bytes == sum(sizes)
    records = list(job.records())
    assert found.images_per_s == pytest.approx(13 / sum(r.seconds for r in records))
    assert [(m.shards, dict(m.hosts)) for m in found.machines] == [(2, {host(): 2})]
    assert (found.differing, found.failed, found.moved, found.abandoned) == ([], {}, 0, 0)
    assert (found.at_work, found.eta) == (0, None)
    assert found.conditions == {"kind": "turn", "labels": [0, 1, 2]}


def test_nothing_is_done_yet(tmp_path: Path, tiny: str) -> None:
    found = status(case.new_job(tmp_path / "run", tiny))
    assert (found.images_done, found.images_per_s, found.eta, found.machines) == (0, 0.0, None, [])


def test_looking_changes_nothing(job: Job) -> None:
    def listed() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in Path(job.place.url).rglob("*")}

    before = listed()
    status(job)
    assert listed() == before


def test_a_shard_of_another_size_is_not_done(job: Job) -> None:
    with case.shard_path(job, 1).open("ab") as file:
        file.write(b"x")
    found = status(job)
    assert (found.images_done, found.shards_done, found.moved) == (5, 1, 1)


def test_shards_may_have_been_moved_away(job: Job) -> None:
    case.shard_path(job, 1).unlink()
    assert (status(job).shards_done, status(job).moved) == (1, 1)
    trusting = status(job, records_only=True)
    assert (trusting.shards_done, trusting.images_done, trusting.moved) == (2, 13, 0)


def test_a_raised_number_leaves_the_short_shard_undone(job: Job) -> None:
    found = status(job.raised(30))
    assert (found.shards, found.shards_done, found.images_done) == (4, 1, 8)


def test_failures_are_those_of_shards_that_are_not_done(job: Job) -> None:
    note_failure(job, 0, "RuntimeError: too hot", 3)
    note_failure(job, 1, "an old story", 1)
    assert status(job).failed == {0: "RuntimeError: too hot"}


def test_machines_that_differ_are_listed(job: Job) -> None:
    record = job.record(1)
    assert record is not None
    other = {**record.fingerprint, "isa": "other", "torch": "1.0"}
    case.changed_record(job, 1, fingerprint=other, host="there")
    run_shard(job, 0)
    found = status(job)
    assert [machine.shards for machine in found.machines] == [2, 1]
    assert dict(found.machines[1].hosts) == {"there": 1}
    assert found.differing == ["isa", "torch"]
    assert len({machine.name for machine in found.machines}) == 2


def test_claims_show_who_is_at_work(job: Job) -> None:
    claim = Claim(job.place, "000000")
    assert claim.take()
    making = Claim(job.place, "job")
    assert making.take()
    found = status(job)
    assert found.at_work == 1
    assert found.eta == pytest.approx(8 / found.images_per_s)
    claim.release()
    assert status(job).at_work == 0


def test_temporary_names_show_who_is_at_work_and_what_is_left(job: Job) -> None:
    shards = Path(job.place.url, "shards")
    (shards / f".stepfuse-{host()}-{os.getpid()}-aa.tmp").touch()
    (shards / ".stepfuse-elsewhere-1-bb.tmp").touch()  # of another machine, just now
    gone = shards / ".stepfuse-elsewhere-1-cc.tmp"
    gone.touch()
    os.utime(gone, (1, 1))
    found = status(job)
    assert (found.at_work, found.abandoned, found.shards_done) == (2, 1, 2)
    assert found.eta == pytest.approx(8 / found.images_per_s / 2)


def test_it_is_json(job: Job) -> None:
    note_failure(job, 0, "cold", 3)
    found = json.loads(json.dumps(status(job).to_json()))
    assert (found["images_done"], found["failed"], found["eta"]) == (13, {"0": "cold"}, None)
    assert found["machines"][0]["hosts"] == {host(): 2}


def test_a_thousand_records_are_read_once(tmp_path: Path, tiny: str) -> None:
    """10^5 of them take as much longer: one is in memory at a time."""
    job = case.new_job(tmp_path / "run", tiny, 8 * 1000 - 3)
    case.many_records(job)
    found = status(job)
    assert (found.images_done, found.shards_done) == (7997, 1000)
    assert found.seconds == 2000.0
