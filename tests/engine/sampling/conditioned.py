"""A model for conditions of any structure, and what may be in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor
from torch.utils import _pytree as pytree

import stepfuse as sf

LINEAR = sf.Schedule.linear()
SHAPE = (3, 1, 4, 4)
ONE, TWO = torch.zeros(3, 2), torch.zeros(2, 2)
GRAPHS = pytest.mark.parametrize("graph", [None, "step"])


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclass
class Embeddings(BaseOutput):
    """As the outputs of diffusers' models are: a dict and a dataclass that pytree knows."""

    text: Tensor | None = None
    image: Tensor | None = None


def mask(seed: int, count: int = 3) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def summed(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """Adds every tensor and number of its condition, each in its own way, whatever holds it."""
    assert not any(isinstance(v, np.ndarray) for v in pytree.tree_leaves(condition))
    out = Bumpy()(x, t)
    for i, leaf in enumerate(pytree.tree_leaves(condition)):
        if isinstance(leaf, Tensor):
            assert leaf.shape[0] == x.shape[0]
            out = out + (0.3 + 0.1 * i) * leaf.to(x.dtype).view(len(x), -1, 1, 1).mean(1, True)
        elif isinstance(leaf, (int, float)):
            out = out + 0.01 * leaf
    return out


def build(model: Any = summed, **settings: Any) -> sf.Sampler:
    return sf.Sampler(model, LINEAR, **{"steps": 3, "graph": "step", **settings})


def captures(sampler: sf.Sampler) -> int:
    assert sampler.stats()["eager_steps"] == 0, sampler.explain()
    return sampler.stats()["captures"]


class Options:
    """An object that is equal to nothing but itself."""

    def __init__(self, scale: Any) -> None:
        self.scale = scale


class Slotted:
    __slots__ = ("__scale",)

    def __init__(self, scale: Any) -> None:
        self.__scale = scale

    @property
    def scale(self) -> Any:
        return self.__scale


@dataclass
class Unknown:
    """A dataclass that pytree does not know."""

    embeds: Any
    more: dict[str, Any] = field(default_factory=dict)
