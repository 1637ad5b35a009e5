"""The inputs that a candidate is tried on: random and real, over all timesteps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.network import Source
from stepfuse.engine.sampling.schedule import Schedule

LARGEST_BATCH = 16  # of a check; larger ones repeat the same arithmetic


@dataclass(frozen=True)
class Inputs:
    """Samples of one kind, each with the bin its timestep was drawn from.

    Attributes:
        kind: "random", x ~ N(0, I), or "real", x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.
        x: float32 [N, C, ...].
        t: int64 [N].
        condition: tensors [N, ...] by name.
        bins: first and last timestep of each sample's bin.
    """

    kind: str
    x: Tensor
    t: Tensor
    condition: dict[str, Tensor]
    bins: list[tuple[int, int]]

    def take(self, index: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, t and condition of some samples."""
        return self.x[index], self.t[index], {k: v[index] for k, v in self.condition.items()}


def batch_sizes(profile: BatchProfile) -> list[int]:
    """Smallest, an odd one, optimum and largest, held to `LARGEST_BATCH` where that is allowed."""
    most = max(profile.minimum, min(profile.maximum, LARGEST_BATCH))
    asked = (profile.minimum, 3, profile.optimum, profile.maximum)
    return sorted({min(max(size, profile.minimum), most) for size in asked})


def timestep_bins(total: int, count: int) -> list[tuple[int, int]]:
    """``count`` parts of 0 .. total-1, as first and last timestep; fewer for short schedules."""
    if count < 1:
        raise ValueError(f"bins must be at least 1; got {count}")
    edges = [total * i // min(count, total) for i in range(min(count, total) + 1)]
    return [(first, after - 1) for first, after in itertools.pairwise(edges)]


def make_inputs(
    source: Source,
    schedule: Schedule,
    images: Tensor,
    bins: list[tuple[int, int]],
    count: int,
    generator: torch.Generator,
) -> list[Inputs]:
    """``count`` random samples and as many real ones; sample n is of bin n modulo their number."""
    made = []
    for kind in ("random", "real"):
        turns = [bins[n % len(bins)] for n in range(count)]
        t = torch.cat([torch.randint(a, b + 1, (1,), generator=generator) for a, b in turns])
        x = torch.randn(count, *source.x.shape[1:], generator=generator, dtype=torch.float64)
        if kind == "real":
            abar = schedule.alphas_cumprod[t].view(-1, *[1] * (x.dim() - 1))
            x0 = images.double()[torch.arange(count) % len(images)]
            x = abar.sqrt() * x0 + (1 - abar).sqrt() * x
        condition = random_condition(source, count, generator)
        made.append(Inputs(kind, x.float(), t, condition, turns))
    return made


def random_condition(source: Source, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Labels in turn, the null class among them, and noise for what is a floating-point number.

    The first label is random: few samples still see as many classes as there are samples.
    """
    condition = {}
    for name, example in source.condition.items():
        shape = (count, *example.shape[1:])
        if name == source.metadata.label_input and source.metadata.num_classes is not None:
            classes = source.metadata.num_classes + 1
            first = torch.randint(0, classes, (1,), generator=generator)
            condition[name] = (first + torch.arange(count)) % classes
        elif example.is_floating_point():
            condition[name] = torch.randn(shape, generator=generator)
        else:
            condition[name] = example[torch.arange(count) % len(example)]
    return condition
