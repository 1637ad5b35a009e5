"""Sums of features of the images, for a Frechet distance to a reference.

A function of the user's makes the features; the sums of every shard lie beside its record, and are
added up in the order of the shards, so that it does not matter who computed them when.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepfuse.engine.generate import record as records
from stepfuse.engine.generate import shards, users
from stepfuse.engine.generate.made import Made
from stepfuse.kernels.checks import received

Features = Callable[[torch.Tensor], Any]


def load_features(name: str) -> Features:
    """The function "module:function"; ValueError where there is none."""
    return users.find("--features", name)


class Moments:
    """n, sum f and sum f f^T over the images of a shard, float64."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.n = 0
        self.sum: NDArray[np.float64] | None = None
        self.outer: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, name: str | None) -> Moments | None:
        """For the function of that name; None without one."""
        return None if name is None else cls(load_features(name))

    def add(self, batch: Sequence[Made]) -> None:
        """More images; ValueError where the function gives no features [N, F]."""
        pixels = torch.from_numpy(np.stack([made.pixels for made in batch])).movedim(-1, 1)
        with torch.no_grad():
            found = torch.as_tensor(self.features(pixels.contiguous()))
        if found.dim() != 2 or len(found) != len(batch):
            raise ValueError(
                f"--features must give [N, F] for N = {len(batch)} images; got {received(found)}"
            )
        features = found.detach().cpu().double().numpy()
        if not np.isfinite(features).all():
            raise ValueError(f"--features gave {np.sum(~np.isfinite(features))} of "
                             f"{features.size} numbers that are NaN or infinite")  # fmt: skip
        if self.sum is None or self.outer is None:
            self.sum, self.outer = features.sum(0), features.T @ features
        else:
            self.sum += features.sum(0)
            self.outer += features.T @ features
        self.n += len(batch)

    @staticmethod
    def name(k: int) -> str:
        """The file of shard k."""
        return f"{records.FOLDER}/{shards.name(k)}.npz"

    def content(self) -> bytes:
        """Of the file: arrays n, sum [F] and outer [F, F]."""
        buffer = io.BytesIO()
        assert self.sum is not None
        assert self.outer is not None
        np.savez(buffer, n=np.int64(self.n), sum=self.sum, outer=self.outer)
        return buffer.getvalue()
