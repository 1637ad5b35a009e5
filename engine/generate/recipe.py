"""How a network is sampled: the words of the command line, and the sampler they mean."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stepfuse.engine.generate.typed import settle
from stepfuse.engine.networks.sampling_defaults import Trained, sampler_settings
from stepfuse.engine.sampling.guidance.cfg import CFG
from stepfuse.engine.sampling.sampler import Sampler

Optimize = Literal["off", "float32", "bfloat16"]
_OWN = ("method", "steps", "spacing", "eta")


@dataclass(frozen=True)
class Recipe:
    """Settings of a `Sampler` that can be written down.

    Attributes:
        method, steps, spacing, eta: see `Sampler`; a string of digits is a number. None for what
            is usual for the network.
        guidance: classifier-free; 1 is none.
        optimize: "off", or the type of matrix products that the network is compiled for.
        backend: see `Sampler`.
    """

    method: str | None = None
    steps: str | None = None
    spacing: str | None = None
    eta: float | None = None
    guidance: float = 1.0
    optimize: Optimize = "off"
    backend: str = "auto"

    def __post_init__(self) -> None:
        settle(self)

    def settled(self, trained: Trained) -> Recipe:
        """The same with nothing left to the network."""
        own = trained.sampling.with_own({name: getattr(self, name) for name in _OWN})
        return replace(self, **{**own, "steps": str(own["steps"])})

    def sampler(
        self, model: Any, trained: Trained, *, guidance: float | None = None, **overrides: Any
    ) -> Sampler:
        """The sampler; its errors name the setting, the value and what is accepted.

        ``trained`` says what the model was trained on; ``guidance`` stands for the recipe's own
        where it is given.
        """
        given = {
            "method": self.method,
            "steps": None if self.steps is None else number_or_words(self.steps),
            "spacing": self.spacing,
            "eta": self.eta,
            "guidance": steering(self.guidance if guidance is None else guidance),
            "backend": self.backend,
            "optimize": compiled_for(self.optimize),
            **overrides,
        }
        return Sampler(model, trained.schedule, **sampler_settings(trained, given))

    def table_hash(self, trained: Trained) -> str:
        """sha256 of the float64 step table, which is everything the update knows of the settings.

        Raises as `Sampler` does, before a network is there.
        """
        sampler = self.sampler(_nobody, trained, guidance=1.0, optimize=False, graph=None)
        table = sampler.plan.table.detach().cpu().contiguous()
        return hashlib.sha256(table.numpy().tobytes()).hexdigest()


def steering(scale: float) -> CFG | None:
    """Classifier-free guidance by the null class; None for scale 1, which needs no second pass."""
    return None if scale == 1 else CFG(scale, unconditional={"labels": None})


def compiled_for(word: str) -> bool | torch.dtype:
    """`Sampler`'s ``optimize`` for the command line's: the embedded weights are float32."""
    return torch.bfloat16 if word == "bfloat16" else word == "float32"


def number_or_words(text: str) -> int | str:
    """Of the command line's ``steps``."""
    try:
        return int(text)
    except ValueError:
        return text


def _nobody(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """Stands for a network whose settings are checked."""
    return x
