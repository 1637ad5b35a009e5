"""Mean and covariance of the images' features, and how far they are from a reference's.

For normal distributions with means m, M and covariances s, S the squared Frechet distance is

    d^2 = |m - M|^2 + tr(s + S - 2 (s^1/2 S s^1/2)^1/2)

which of Inception's features is the FID (Heusel et al. 2017, equation 6; that has (s S)^1/2, whose
trace is the same). It is what everybody reports, without taking its root.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfuse.engine.files.reading import open_regular, reason
from stepfuse.engine.generate.features import Moments
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.record import Record
from stepfuse.engine.generate.words import many

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Stats:
    """Of features [N, F].

    Attributes:
        images: N.
        mu: the mean, float64 [F].
        sigma: the covariance, divided by N - 1, float64 [F, F].
    """

    images: int
    mu: Array
    sigma: Array

    @property
    def singular(self) -> bool:
        """Whether there are too few images for every direction of the features."""
        return self.images <= len(self.mu)


def stats(job: Job) -> Stats:
    """Add up the sums of all shards, in the order of their numbers.

    The result is the same to the last bit whoever made the shards, and whenever. Shards may have
    been moved away; records and sums must be there.

    Raises ValueError for a job without features or one that is not complete, and where sums are
    missing or damaged.
    """
    if job.settings.features is None:
        raise ValueError(
            f"{job.place.url} has no sums of features; accepted: a job that was made with "
            "--features module:function"
        )
    missing = len(job.shards) - sum(job.done(records_only=True))
    if missing:
        raise ValueError(
            f"{job.place.url} lacks {missing} of {many(len(job.shards), 'shard')}; "
            f"`stepfuse generate {job.place.url}` makes them"
        )
    n, total, outer = 0, np.zeros(0), np.zeros((0, 0))
    for record in job.records():
        part = _moments(job, record, len(total) if n else None)
        if n:
            total += part[0]
            outer += part[1]
        else:
            total, outer = part
        n += record.count
    if n < 2:
        raise ValueError(f"a covariance needs 2 images at least; {job.place.url} has {n}")
    mu = total / n
    return Stats(n, mu, (outer - np.outer(mu, total)) / (n - 1))


def frechet(mu: Array, sigma: Array, other_mu: Array, other_sigma: Array) -> float:
    """The squared distance d^2 of the module's docstring.

    Roots are taken of symmetric matrices only, by their eigenvalues in float64. Directions in which
    ``sigma`` is nothing but rounding are left out, so that singular covariances need no epsilon.
    """
    values, vectors = np.linalg.eigh(sigma)
    there = values > values.max() * len(values) * np.finfo(np.float64).eps
    root = vectors[:, there] * np.sqrt(values[there])
    inner = root.T @ other_sigma @ root  # the eigenvalues of s^1/2 S s^1/2 that are not 0
    shared = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    apart = mu - other_mu
    return float(apart @ apart + np.trace(sigma) + np.trace(other_sigma) - 2 * shared)


def read_reference(path: str | os.PathLike[str]) -> tuple[Array, Array]:
    """``mu`` and ``sigma`` of an .npz file, as guided-diffusion's references have them.

    Raises ValueError for a file that is none, OSError where it cannot be read.
    """
    with open_regular(path, "an .npz file with mu and sigma") as file:
        content = _arrays(file, os.fspath(path), ("mu", "sigma"))
    mu, sigma = content["mu"], content["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{os.fspath(path)} must have mu [F] and sigma [F, F]; got {list(mu.shape)} and "
            f"{list(sigma.shape)}"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{os.fspath(path)} has values in mu or sigma that are no finite numbers")
    return mu, sigma


def check_widths(job: Stats, reference: Array, path: str | os.PathLike[str]) -> None:
    """Raise ValueError where job and reference have not the same number of features."""
    if len(job.mu) != len(reference):
        raise ValueError(
            f"{os.fspath(path)} is of {len(reference)} features, the job of {len(job.mu)}: "
            "accepted are those of the same function"
        )


def _moments(job: Job, record: Record, width: int | None) -> tuple[Array, Array]:
    """sum [F] and outer [F, F] of one shard; ValueError unless they are of its images."""
    name = Moments.name(record.shard)
    where = f"{job.place.url}/{name}"
    again = f"remove {job.place.url}/{job.record_name(record.shard)} and run the job again"
    try:
        content = job.place.read(name)
    except FileNotFoundError:
        raise ValueError(f"{where} is not there; {again}") from None
    found = _arrays(io.BytesIO(content), where, ("n", "sum", "outer"))
    n, total, outer = found["n"], found["sum"], found["outer"]
    features = total.shape[0] if width is None and total.ndim == 1 else width
    if n.shape or total.shape != (features,) or outer.shape != (features, features):
        raise ValueError(
            f"{where} has sums of shape {list(total.shape)} and {list(outer.shape)}; expected "
            f"[{features}] and [{features}, {features}]; {again}"
        )
    if int(n) != record.count:
        raise ValueError(f"{where} is of {int(n)} images, its record of {record.count}; {again}")
    return total, outer


def _arrays(file: Any, where: str, names: tuple[str, ...]) -> dict[str, Array]:
    """These arrays of an .npz file as float64, nothing else of it being read."""
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is one array")
        with loaded as archive:
            there = sorted(archive.files)
            found = {name: archive[name] for name in names if name in there}
            result = {name: array.astype(np.float64) for name, array in found.items()}
    except Exception as error:  # zipfile, zlib and numpy raise anything for a damaged file
        raise ValueError(f"{where} is not a readable .npz file: {reason(error)}") from None
    if len(result) < len(names):
        raise ValueError(f"{where} has arrays {there}; it must have {', '.join(names)}")
    return result
