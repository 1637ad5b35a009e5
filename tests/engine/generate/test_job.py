"""What a job's images depend on, and what they do not."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.engine.generate import case, models

import stepfuse as sf
from stepfuse.engine.files.images import to_uint8
from stepfuse.engine.generate.create import OtherJob, create, raise_count
from stepfuse.engine.generate.job import open_job
from stepfuse.engine.generate.place import open_place
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.work import forget, run_shard, todo


def _sampler(**options: object) -> sf.Sampler:
    return sf.Sampler(models.plain().model, sf.Schedule.linear(100), steps=2, **options)  # type: ignore[arg-type]


def _pictures(path: Path) -> dict[int, np.ndarray]:
    found = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".png"):
                file = tar.extractfile(member)
                assert file is not None
                found[int(Path(member.name).stem)] = np.asarray(Image.open(file))
    return found


def test_images_are_those_of_the_sampler(tmp_path: Path) -> None:
    """Also the last ones, whose batch is filled up with images that are not kept."""
    job = case.new_job(tmp_path / "run", 21, seed=7)
    case.make_all(job)
    found: dict[int, np.ndarray] = {}
    for k in job.shards:
        found |= _pictures(tmp_path / "run" / job.shard_name(k))
    assert sorted(found) == list(range(21))
    sampler = _sampler()
    for first in range(0, 21, 4):
        x = sampler.sample(
            (4, *models.SHAPE),
            seed=7,
            first_index=first,
            condition={"labels": torch.arange(first, first + 4) % 3},
        )
        for n, image in enumerate(to_uint8(x), start=first):
            if n < 21:
                assert np.array_equal(found[n], image[0].numpy())


def test_far_images_are_those_of_the_sampler(tmp_path: Path) -> None:
    """Acceptance 11: nothing loops over the images before."""
    for n in (10**8, (1 << 40) + 3):
        job = case.new_job(tmp_path / str(n), n)
        k = len(job.shards) - 1
        record = run_shard(job, k)
        assert record.first + record.count == n
        last = n - 1
        pictures = _pictures(tmp_path / str(n) / job.shard_name(k))
        numbers = torch.arange(record.first, record.first + 4)
        x = _sampler().sample(
            (4, *models.SHAPE), first_index=numbers, condition={"labels": numbers % 3}
        )
        assert np.array_equal(pictures[record.first], to_uint8(x)[0, 0].numpy())
        assert last in pictures


def test_a_shard_that_is_done_is_not_made_again(tmp_path: Path) -> None:
    job = case.new_job(tmp_path / "run")
    record = run_shard(job, 1)
    before = os.stat(tmp_path / "run" / job.shard_name(1))
    assert run_shard(job, 1) == record
    assert os.stat(tmp_path / "run" / job.shard_name(1)) == before
    assert todo(job) == [0, 2]


@pytest.mark.parametrize("fault", ["no record", "no shard", "short", "damaged record"])
def test_whatever_is_not_whole_is_made_again_into_the_same_bytes(
    tmp_path: Path, fault: str
) -> None:
    job = case.new_job(tmp_path / "run")
    expected = case.make_all(job)
    shard, record = tmp_path / "run" / job.shard_name(1), tmp_path / "run" / job.record_name(1)
    if fault == "no record":
        record.unlink()
    elif fault == "no shard":
        shard.unlink()
    elif fault == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        record.write_bytes(record.read_bytes()[:-9])
    assert todo(job) == [1]
    assert case.make_all(job) == expected
    assert todo(job) == []
    if fault == "no shard":
        shard.unlink()
        assert todo(job, records_only=True) == []


def test_labels_seed_and_guidance_of_a_table_are_those_of_the_image(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("label,seed,guidance,caption\n1,5,,a\n0,,2.5,b\nnone,9,,c\n2,,2.5,d\n7,,,e\n")
    job = case.new_job(tmp_path / "run", 5, conditions=str(table))
    case.make_all(job)
    pictures = _pictures(tmp_path / "run" / job.shard_name(0))
    labels, seeds = torch.tensor([1, 0, 3, 2, 2]), torch.tensor([5, 0, 9, 0, 0])
    plain = _sampler()
    guided = _sampler(guidance=sf.CFG(2.5, unconditional={"labels": None}))
    for n in range(5):
        sampler = guided if n in (1, 3) else plain
        x = sampler.sample(
            (4, *models.SHAPE),
            seed=seeds[n].expand(4).clone(),
            first_index=torch.full((4,), n),
            condition={"labels": labels[n].expand(4).clone()},
        )
        assert np.array_equal(pictures[n], to_uint8(x)[0, 0].numpy()), n
    with tarfile.open(tmp_path / "run" / job.shard_name(0)) as tar:
        file = tar.extractfile("000000000001.json")
        assert file is not None
        assert json.load(file) == {"caption": "b", "guidance": 2.5, "label_name": "circle"}


def test_truncated_pixels_are_adms(tmp_path: Path) -> None:
    near = case.new_job(tmp_path / "near", 8, format="npz")
    cut = case.new_job(tmp_path / "cut", 8, format="npz", rounding="truncate")
    arrays = []
    for job in (near, cut):
        case.make_all(job)
        with np.load(Path(job.place.url) / job.shard_name(0), allow_pickle=False) as read:
            arrays.append(read["arr_0"].astype(int))
    assert set(np.unique(arrays[0] - arrays[1])) == {0, 1}
    assert near.sha256 != cut.sha256


def test_samples_are_written_as_they_are(tmp_path: Path) -> None:
    job = case.new_job(tmp_path / "run", 8, format="npy")
    case.make_all(job)
    x = np.load(tmp_path / "run" / job.shard_name(0), allow_pickle=False)
    assert x.dtype == np.float32
    assert x.shape == (8, *models.SHAPE)
    expected = _sampler().sample((4, *models.SHAPE), condition={"labels": torch.arange(4) % 3})
    assert np.array_equal(x[:4], expected.numpy())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 asked for"),
        ({"recipe": Recipe(steps="3")}, "sampling.steps: '2' there, '3' asked for"),
        ({"rounding": "truncate"}, "output.rounding: 'nearest' there"),
        ({"batch_size": 2}, "batch_size: 4 there, 2 asked for"),
        ({"labels": "random"}, "conditions.kind"),
        ({"format": "npz"}, "output.name: 'webdataset' there, 'npz' asked for"),
        ({"model": f"{case.MODELS}:poison"}, ""),  # of the same weights
    ],
)
def test_another_job_in_the_folder_is_named(
    tmp_path: Path, options: dict[str, object], named: str
) -> None:
    case.new_job(tmp_path / "run", 8)
    if not named:
        assert case.new_job(tmp_path / "run", 8, **options).n == 8
        return
    with pytest.raises(OtherJob, match=f".* holds another job: .*{named}"):
        case.new_job(tmp_path / "run", 8, **options)


def test_a_job_that_is_not_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no job"):
        open_job(tmp_path)
    job = case.new_job(tmp_path / "run")
    path = tmp_path / "run" / "job.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "identity": {**content["identity"], "seed": 3}}))
    with pytest.raises(ValueError, match="changed by hand"):
        open_job(tmp_path / "run")
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        open_job(tmp_path / "run")
    assert job.n == 21


def test_a_plan_of_another_job_is_refused(tmp_path: Path) -> None:
    job = case.new_job(tmp_path / "run")
    (tmp_path / "run" / "plan.json").write_text("{}")
    forget()
    with pytest.raises(ValueError, match=r"plan\.json is not the one"):
        run_shard(open_job(tmp_path / "run"), 0)
    assert job.n == 21


def test_a_job_may_be_at_a_url(tmp_path: Path) -> None:
    """Acceptance of remote places, with fsspec's own memory."""
    place = open_place("memory://bucket/run")
    job = create(case.settings(), 21, place).job
    for k in todo(job):
        run_shard(job, k)
    again = open_job("memory://bucket/run")
    assert todo(again) == []
    assert case.hashes(again) == case.make_all(case.new_job(tmp_path / "run", 21))
    raised = raise_count(again, 30)
    assert todo(raised) == [2, 3]
    with pytest.raises(ValueError, match="no URL that fsspec knows"):
        open_place("nonsense-protocol://x/y")


def test_a_folder_of_pictures_is_a_shard(tmp_path: Path) -> None:
    job = case.new_job(tmp_path / "run", 21, format="png")
    first = case.make_all(job)
    assert len(list((tmp_path / "run" / "shards" / "000002").glob("*.png"))) == 5
    raised = raise_count(job, 24)
    assert todo(raised) == [2]
    made = case.make_all(raised)
    assert {k: v for k, v in made.items() if "000002" not in k} == {
        k: v for k, v in first.items() if "000002" not in k
    }
    assert len(list((tmp_path / "run" / "shards" / "000002").glob("*.png"))) == 8


def test_the_libraries_of_the_format_are_in_the_fingerprint(tmp_path: Path) -> None:
    """A shard's bytes depend on them: records of two versions are not compared byte for byte."""
    pyarrow = pytest.importorskip("pyarrow")
    table = run_shard(case.new_job(tmp_path / "table", format="parquet"), 0).fingerprint
    archive = run_shard(case.new_job(tmp_path / "archive", image="webp"), 0).fingerprint
    assert table["pyarrow"] == pyarrow.__version__
    assert "libwebp" in archive
    assert "pyarrow" not in archive
