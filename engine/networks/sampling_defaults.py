"""How a network is sampled where nobody asks for something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from stepfuse.engine.networks.normalization import Normalization
from stepfuse.engine.sampling.methods import names
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import Spacing
from stepfuse.kernels.arguments import check_literal
from stepfuse.kernels.checks import as_integer, as_number, check_word


@dataclass(frozen=True)
class SamplingDefaults:
    """Arguments of a `Sampler`; raises TypeError or ValueError for what it would not take."""

    method: str = "ddim"
    steps: int | str = 50
    spacing: str = "leading"
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_word("method", self.method, names())
        check_literal("spacing", self.spacing, Spacing)
        words = isinstance(self.steps, str)
        if not self.steps if words else as_integer("steps", self.steps) < 1:
            raise ValueError(f"steps must be a number of at least 1, or words; got {self.steps!r}")
        if not 0 <= as_number("eta", self.eta) <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta}")

    def to_json(self) -> dict[str, Any]:
        """What differs from the usual, as a checkpoint keeps it."""
        usual = asdict(SamplingDefaults())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    @classmethod
    def from_json(cls, values: Any) -> SamplingDefaults:
        """The inverse; ValueError for settings that are none."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not values.keys() <= known:
            raise ValueError(
                f"sampling is {str(values)[:60]!r}; accepted: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def with_own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All four, those that are given (not None) in place of these.

        An eta that belongs to this method is left out where another method is given.
        """
        own = {name: value for name, value in given.items() if value is not None}
        settings = {**asdict(self), **own}
        if settings["method"] != self.method and "eta" not in own:
            settings["eta"] = 0.0
        return settings


class Trained(Protocol):
    """What a network was trained on, and how it is sampled: a `Checkpoint`, say."""

    @property
    def schedule(self) -> Schedule:
        """The forward process."""

    @property
    def prediction_type(self) -> str:
        """Of the output."""

    @property
    def learned_variance(self) -> bool:
        """Whether the output has 2C channels."""

    @property
    def normalization(self) -> Normalization | None:
        """Of its images."""

    @property
    def sampling(self) -> SamplingDefaults:
        """What is usual for it."""


def sampler_settings(trained: Trained, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the network's own `Sampler`, those that are given in their place.

    x0 is not clipped where its numbers are no pixels in [-1, 1].
    """
    own = ("method", "steps", "spacing", "eta")
    return {
        "prediction_type": trained.prediction_type,
        "variance_type": "learned_range" if trained.learned_variance else "fixed_small",
        "clip_sample": 1.0 if trained.normalization is None else None,
        **trained.sampling.with_own({n: v for n, v in given.items() if n in own}),
        **{name: value for name, value in given.items() if name not in own},
    }
