"""Sums of features, their mean and covariance, and the distance between two of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from tests.engine.generate import look_case as case

from stepfuse.engine.generate.features import Moments
from stepfuse.engine.generate.formats import decoded
from stepfuse.engine.generate.job import Job, open_job
from stepfuse.engine.generate.stats import frechet, read_reference, stats
from stepfuse.engine.generate.work import run_shard


@pytest.fixture
def job(tmp_path: Path, tiny: str) -> Job:
    """Complete, with features."""
    return case.made_job(tmp_path / "run", tiny, features=case.FEATURES)


def test_mean_and_covariance_are_those_of_all_images(job: Job) -> None:
    pictures = [
        pixels
        for k in job.shards
        for _, pixels in decoded(
            job.format, case.shard_path(job, k), *job.shards.span(k), (1, 8, 8)
        )
    ]
    found = case.features(torch.from_numpy(np.stack(pictures)).movedim(-1, 1)).numpy()
    got = stats(job)
    assert got.images == 21
    assert not got.singular
    np.testing.assert_allclose(got.mu, found.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.sigma, np.cov(found, rowvar=False), rtol=1e-9, atol=1e-15)


def test_the_order_of_computing_does_not_matter(job: Job, tmp_path: Path, tiny: str) -> None:
    other = case.new_job(tmp_path / "other", tiny, features=case.FEATURES)
    for k in (2, 0, 1):
        run_shard(other, k)
    one, two = stats(job), stats(open_job(other.place))
    assert one.mu.tobytes() == two.mu.tobytes()
    assert one.sigma.tobytes() == two.sigma.tobytes()


def test_shards_may_have_been_moved_away(job: Job) -> None:
    case.shard_path(job, 0).unlink()
    assert stats(job).images == 21


def test_a_job_without_features(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(ValueError, match=r"no sums of features; accepted: .*--features"):
        stats(case.new_job(tmp_path / "run", tiny))


def test_a_job_that_is_not_complete(job: Job) -> None:
    job.place.remove(job.record_name(1))
    with pytest.raises(ValueError, match="lacks 1 of 3 shards"):
        stats(job)


def test_sums_that_are_not_there(job: Job) -> None:
    job.place.remove(Moments.name(1))
    with pytest.raises(ValueError, match=r"records/000001.npz is not there; remove .*000001.json"):
        stats(job)


def test_sums_of_other_images(job: Job) -> None:
    job.place.write(Moments.name(1), job.place.read(Moments.name(2)))
    with pytest.raises(ValueError, match=r"000001\.npz is of 5 images, its record of 8"):
        stats(job)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x93NUMPY\x01\x00"])
def test_damaged_sums(job: Job, content: bytes) -> None:
    job.place.write(Moments.name(0), content)
    with pytest.raises(ValueError, match=r"000000\.npz is not a readable .npz file"):
        stats(job)


def test_sums_of_other_features(job: Job) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, n=np.int64(8), sum=np.zeros(4), outer=np.zeros((4, 4)))
    job.place.write(Moments.name(1), buffer.getvalue())
    with pytest.raises(ValueError, match=r"shape \[4\] and \[4, 4\]; expected \[3\] and \[3, 3\]"):
        stats(job)


def test_one_image_has_no_covariance(tmp_path: Path, tiny: str) -> None:
    job = case.made_job(tmp_path / "run", tiny, 1, features=case.FEATURES)
    with pytest.raises(ValueError, match="needs 2 images"):
        stats(job)


def test_few_images_are_said_to_be_few(tmp_path: Path, tiny: str) -> None:
    job = case.made_job(tmp_path / "run", tiny, 3, features=case.FEATURES)
    assert stats(job).singular


def _normal(width: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(count, width)) @ chance.normal(size=(width, width)) + 0.5 * seed
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize("width", [1, 2, 7, 33])
def test_the_distance_is_that_of_the_formula(width: int) -> None:
    mu, sigma = _normal(width, 200, 1)
    other_mu, other_sigma = _normal(width, 300, 2)
    sigma, other_sigma = sigma.reshape(width, width), other_sigma.reshape(width, width)
    root = np.atleast_2d(sqrtm(sigma @ other_sigma))
    expected = (
        np.square(mu - other_mu).sum() + np.trace(sigma + other_sigma) - 2 * np.trace(root).real
    )
    found = frechet(mu, sigma, other_mu, other_sigma)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found == pytest.approx(frechet(other_mu, other_sigma, mu, sigma), rel=1e-9)


def test_nothing_is_far_from_itself() -> None:
    mu, sigma = _normal(33, 100, 3)
    assert frechet(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9 * np.trace(sigma))


def test_singular_covariances_need_no_epsilon() -> None:
    """Twenty samples of 33 features; those along one direction differ in scale alone."""
    mu, sigma = _normal(33, 20, 4)
    assert frechet(mu, sigma, mu, 4 * sigma) == pytest.approx(np.trace(sigma), rel=1e-6)


def test_diagonal_covariances_are_distances_of_deviations() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.0])
    found = frechet(np.zeros(3), np.diag(a), np.ones(3), np.diag(b))
    assert found == pytest.approx(3 + np.square(np.sqrt(a) - np.sqrt(b)).sum())


def test_a_reference_is_read_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    mu = np.arange(2, dtype=np.float32)
    np.savez(path, mu=mu, sigma=np.eye(2), arr_0=np.array([object()], dtype=object))
    found = read_reference(path)
    assert found[0].dtype == found[1].dtype == np.float64
    np.testing.assert_array_equal(found[0], mu)


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"mu": np.zeros(2)}, r"has arrays \['mu'\]; it must have mu, sigma"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"got \[2\] and \[3, 3\]"),
        ({"mu": np.zeros((2, 1)), "sigma": np.eye(2)}, r"got \[2, 1\] and \[2, 2\]"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "no finite numbers"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "not a readable .npz file"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "holds Python objects"),
    ],
)
def test_bad_references(tmp_path: Path, arrays: dict[str, np.ndarray], why: str) -> None:
    path = tmp_path / "ref.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=why):
        read_reference(path)


def test_an_array_is_no_reference(tmp_path: Path) -> None:
    np.save(tmp_path / "ref.npy", np.zeros(3))
    with pytest.raises(ValueError, match="it is one array"):
        read_reference(tmp_path / "ref.npy")
    with pytest.raises(FileNotFoundError):
        read_reference(tmp_path / "none.npz")


def test_no_variance_at_all() -> None:
    zero, one = np.zeros((2, 2)), np.eye(2)
    assert frechet(np.zeros(2), zero, np.ones(2), one) == 4
    assert frechet(np.zeros(2), one, np.ones(2), zero) == 4
