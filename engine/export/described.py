"""What a runtime knows of its network from the metadata in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from stepfuse.engine.export.metadata import Metadata
from stepfuse.engine.sampling.labels import check_range
from stepfuse.engine.sampling.schedule import Schedule


class Described:
    """The arguments of a `Sampler`, for a denoiser with ``path`` and ``metadata``.

    Each raises ValueError where the file does not say.
    """

    path: Path
    metadata: Metadata | None

    @property
    def schedule(self) -> Schedule:
        """The schedule it was trained on."""
        schedule: Schedule = self._known("schedule")
        return schedule

    @property
    def prediction_type(self) -> Any:
        """ "epsilon", "sample", "v_prediction" or "mean"."""
        return self._known("prediction_type")

    @property
    def variance_type(self) -> Any:
        """As in `Sampler`."""
        return self._known("variance_type")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one sample."""
        shape: tuple[int, ...] = self._known("sample_shape")
        return shape

    @property
    def label_input(self) -> str | None:
        """The input that takes class labels; None where there is none, or no number of classes."""
        known = self.metadata
        return None if known is None or known.num_classes is None else known.label_input

    def check_labels(self, labels: Tensor) -> None:
        """Raise unless every label is in 0..num_classes, see `check_range`."""
        assert self.metadata is not None
        check_range(labels, self.metadata.num_classes)

    def _known(self, name: str) -> Any:
        value = None if self.metadata is None else getattr(self.metadata, name)
        if value is None:
            raise ValueError(f"{self.path} names no {name}; give it to the Sampler yourself")
        return value
