"""What `verify` finds: whatever is not as it was made, by the numbers of the images."""

from __future__ import annotations

import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.generate import look_case as case

from stepfuse.engine.generate.job import Job, open_job
from stepfuse.engine.generate.outcome import COMPLETE, DIFFERS, POISONED
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.record import pack
from stepfuse.engine.generate.remake import limit, psnr
from stepfuse.engine.generate.verify import Verified, verify
from stepfuse.engine.generate.worker import Worker


@pytest.fixture
def job(tmp_path: Path, tiny: str) -> Job:
    """Complete: 21 images in three shards."""
    return case.made_job(tmp_path / "run", tiny)


def told(found: Verified) -> list[tuple[int | None, int]]:
    """Images and shards of the differences."""
    return [(difference.n, difference.shard) for difference in found.differences]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made again is made by another kind of machine."""
    there = {"isa": "another"}
    monkeypatch.setattr("stepfuse.engine.generate.remake.fingerprint", lambda *_: there)


def nudged(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Samples differ by a number everywhere."""
    sample = Worker.sample
    monkeypatch.setattr(Worker, "sample", lambda *given: sample(*given) + by)


@pytest.mark.parametrize("format", ["webdataset", "npz", "png", "webp", "jpeg", "npy"])
def test_a_job_is_right(tmp_path: Path, tiny: str, format: str) -> None:
    found = verify(case.made_job(tmp_path / "run", tiny, format=format), full=True)
    assert (found.status, found.differences, found.missing) == (COMPLETE, [], [])
    assert (found.images, found.shards, found.equal, found.alike) == (21, 3, 21, 0)


def test_images_are_drawn_with_their_batches(job: Job) -> None:
    found = verify(job, 1)
    assert found.status == COMPLETE
    assert found.equal in (1, 4)  # the last batch of the job has one image
    assert verify(job, 10**6).equal == 21
    assert verify(job, 5, seed=3) == verify(job, 5, seed=3)


def test_none_may_be_drawn(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("stepfuse.engine.generate.worker.Worker.batch")
    found = verify(job, 0)
    assert (found.status, found.images, found.equal) == (COMPLETE, 21, 0)
    with pytest.raises(ValueError, match="-k must be at least 0; got -1"):
        verify(job, -1)


@pytest.mark.parametrize("format", ["webdataset", "npz", "png"])
def test_a_flipped_byte_is_named(tmp_path: Path, tiny: str, format: str) -> None:
    job = case.made_job(tmp_path / "run", tiny, format=format)
    path = case.shard_path(job, 1)
    content = dict(job.format.entries(path, 8))[11]
    if path.is_dir():
        case.flipped(path / "000000000011.png", len(content) // 2)
    else:
        case.flipped(path, path.read_bytes().index(content) + len(content) // 2)
    found = verify(job)
    assert (found.status, told(found)) == (DIFFERS, [(11, 1)])
    assert "other bytes than its record says" in str(found.differences[0])
    assert found.equal == 20  # it is named once


def test_swapped_images_are_named(tmp_path: Path, tiny: str) -> None:
    job = case.made_job(tmp_path / "run", tiny, format="png")
    folder = case.shard_path(job, 0)
    one, two = folder / "000000000002.png", folder / "000000000005.png"
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    found = verify(job, 0)
    assert told(found) == [(2, 0), (5, 0)]
    assert "they are those of image 5" in found.differences[0].what


def test_images_swapped_in_a_tar_are_named(job: Job) -> None:
    path = case.shard_path(job, 0)
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"000000000002", b"x" * 12)
        .replace(b"000000000005", b"000000000002")
        .replace(b"x" * 12, b"000000000005")
    )
    found = verify(job, 0)
    assert found.status == DIFFERS
    assert found.differences[0].n in (1, 2)  # checksums of headers are wrong by now
    assert "image 2" in found.differences[0].what


def test_a_missing_and_a_surplus_image_are_named(tmp_path: Path, tiny: str) -> None:
    job = case.made_job(tmp_path / "run", tiny, format="png")
    (case.shard_path(job, 0) / "000000000007.png").unlink()
    (case.shard_path(job, 1) / "000000000016.png").write_bytes(b"")
    found = verify(job, 0)
    assert told(found) == [(7, 0), (16, 1)]
    assert "missing" in found.differences[0].what
    assert "should not be there" in found.differences[1].what


def test_labels_that_are_others_are_seen(job: Job) -> None:
    path = case.shard_path(job, 0)
    with tarfile.open(path) as archive:
        offset = archive.getmember("000000000001.cls").offset_data
    case.flipped(path, offset)
    found = verify(job, 0)
    assert told(found) == [(None, 0)]
    assert "every image is right: labels" in str(found.differences[0])


def test_an_appended_byte_is_seen(job: Job) -> None:
    with case.shard_path(job, 2).open("ab") as file:
        file.write(b"\0")
    found = verify(job, 0)
    assert told(found) == [(None, 2)]
    assert "its record of" in str(found.differences[0])


def test_a_truncated_shard_is_named(job: Job) -> None:
    path = case.shard_path(job, 2)
    path.write_bytes(path.read_bytes()[:2000])
    found = verify(job, 0)
    assert found.differences[0].shard == 2
    assert found.differences[0].n is not None
    assert found.status == DIFFERS


def test_missing_shards_are_no_difference(job: Job) -> None:
    case.shard_path(job, 1).unlink()
    job.place.remove(job.record_name(2))
    found = verify(job)
    assert (found.status, found.missing, found.differences) == (POISONED, [1, 2], [])
    assert (found.images, found.equal) == (8, 8)


def test_differences_count_more_than_missing_shards(job: Job) -> None:
    case.shard_path(job, 1).unlink()
    case.flipped(case.shard_path(job, 0), 600)
    assert verify(job, 0).status == DIFFERS


def test_nothing_is_there(tmp_path: Path, tiny: str) -> None:
    found = verify(case.new_job(tmp_path / "run", tiny))
    assert (found.status, found.missing, found.images) == (POISONED, [0, 1, 2], 0)


def test_a_raised_number_leaves_shards_missing(job: Job) -> None:
    found = verify(job.raised(30))
    assert (found.status, found.missing, found.images) == (POISONED, [2, 3], 16)


def test_records_must_cover_every_image_once(job: Job) -> None:
    case.changed_record(job, 1, first=0)
    record = job.record(0)
    assert record is not None
    job.place.write("records/000007.json", record.to_json())
    job.place.write("records/000002.json", b"{")
    found = verify(job, 0)
    assert told(found) == [(None, 1), (None, 2), (None, 7)]
    assert "is of images 0 .. 7; expected 8 .. 15" in found.differences[0].what
    assert "damaged" in found.differences[1].what
    assert "the job has 3 shards" in found.differences[2].what


def test_a_record_of_other_images_is_found_by_making_them(job: Job) -> None:
    """Shard and record agree, and are not of this job."""
    other = case.made_job(Path(f"{job.place.url}-2"), job.settings.model, seed=1)
    for name in (job.shard_name(1), job.record_name(1)):
        job.place.write(name, other.place.read(name))
    assert verify(job, 0).status == COMPLETE
    found = verify(job, full=True)
    assert found.status == DIFFERS
    assert told(found) == [(n, 1) for n in range(8, 16)]
    assert "made again on a machine like that of its record" in found.differences[0].what


def test_records_alone(job: Job) -> None:
    for k in job.shards:
        case.shard_path(job, k).unlink()
    assert verify(job).missing == [0, 1, 2]
    found = verify(job, full=True, records_only=True)
    assert (found.status, found.images, found.equal, found.missing) == (COMPLETE, 21, 21, [])
    record = job.record(1)
    assert record is not None
    sums = record.checksums().copy()
    sums[[2, 3]] = sums[[3, 2]]
    case.changed_record(job, 1, crc32=pack(sums.tolist()))
    found = verify(job, full=True, records_only=True)
    assert told(found) == [(10, 1), (11, 1)]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("format", ["webdataset", "jpeg", "npy"])
def test_another_machine_may_differ_a_little(
    tmp_path: Path, tiny: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = case.made_job(tmp_path / "run", tiny, format=format)
    found = verify(job)
    assert (found.status, found.equal, found.alike, found.worst) == (COMPLETE, 0, 21, math.inf)
    nudged(monkeypatch, 1e-5)
    found = verify(job)
    assert (found.status, found.alike) == (COMPLETE, 21)
    nudged(monkeypatch, 0.2)
    found = verify(job, full=True)
    assert (found.status, found.found) == (DIFFERS, 21)
    assert "dB from what is made here" in found.differences[0].what


@pytest.mark.usefixtures("elsewhere")
def test_records_alone_of_another_machine_are_not_compared(job: Job) -> None:
    found = verify(job, records_only=True)
    assert (found.status, found.unread, found.equal) == (COMPLETE, 21, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 60),
        ({"recipe": Recipe(steps="2", optimize="float32")}, 60),
        ({"recipe": Recipe(steps="2", optimize="bfloat16")}, 35),
        ({"format": "jpeg"}, 35),
        ({"image": "jpeg"}, 35),
    ],
)
def test_how_near_another_machine_must_come(
    job: Job, options: dict[str, Any], expected: float
) -> None:
    output = {"image": options.pop("image", options.pop("format", "png"))}
    settings = replace(job.settings, **options)
    changed = replace(job, settings=settings, identity={**job.identity, "output": output})
    assert limit(changed) == expected


def test_psnr_is_the_formula() -> None:
    a = np.zeros((2, 2, 1), np.uint8)
    b = a.copy()
    b[0, 0] = 2
    assert psnr(a, b, 255) == pytest.approx(10 * math.log10(255**2))
    assert psnr(a, a, 255) == math.inf


def test_rows_of_their_own_are_made_again_in_their_batches(tmp_path: Path, tiny: str) -> None:
    """Guidance sorts the images of a shard, seeds are their own."""
    rows = tmp_path / "rows.csv"
    lines = [f"{n % 3},{n * 7 if n % 2 else ''},{n % 3}.5" for n in range(21)]
    rows.write_text("label,seed,guidance\n" + "\n".join(lines) + "\n")
    job = case.made_job(tmp_path / "run", tiny, conditions=str(rows))
    assert verify(job, full=True).equal == 21
    assert verify(job, 2).status == COMPLETE
    rows.write_text(rows.read_text().replace("0.5", "1.5"))
    with pytest.raises(ValueError, match="has changed since the job was created"):
        verify(open_job(job.place))


def test_other_weights_are_refused(tmp_path: Path, tiny: str) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(Path(tiny).read_bytes())
    job = case.made_job(tmp_path / "run", str(model))
    case.flipped(model, -1)
    with pytest.raises(ValueError, match="has weights"):
        verify(open_job(job.place))
    assert verify(open_job(job.place), 0).status == COMPLETE  # the model is not needed


def test_a_model_that_has_gone_is_named(tmp_path: Path, tiny: str) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(Path(tiny).read_bytes())
    job = case.made_job(tmp_path / "run", str(model))
    model.unlink()
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        verify(open_job(job.place))


def test_many_differences_are_counted_and_some_kept(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepfuse.engine.generate.verify.KEPT", 2)
    content = json.loads(job.place.read(job.record_name(0)))
    content["crc32"] = pack([0] * 8)
    job.place.write(job.record_name(0), json.dumps(content).encode())
    found = verify(job, 0)
    assert (found.found, len(found.differences)) == (8, 2)


def test_threads_of_the_process_stay(job: Job) -> None:
    before = torch.get_num_threads()
    verify(job, 2)
    assert torch.get_num_threads() == before


def test_damaged_checksums_are_named(job: Job) -> None:
    record = job.record(1)
    assert record is not None
    case.changed_record(job, 1, crc32=f"?{record.crc32[1:]}")  # as long as it should be
    found = verify(job, 0)
    assert told(found) == [(None, 1)]
    assert "records/000001.json" in str(found.differences[0])
