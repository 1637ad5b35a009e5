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
        order, solver_type, grid: see `Sampler`, too; numbers with commas between are sigmas.
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
    order: int | None = None
    solver_type: str | None = None
    grid: str | None = None

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
            **self.solver(),
            **overrides,
        }
        if self.grid is not None:
            given["grid"] = _sigmas(self.grid)
        return Sampler(model, trained.schedule, **sampler_settings(trained, given))

    def solver(self) -> dict[str, Any]:
        """What was chosen of order, type and grid, by name: most methods have nothing of these."""
        chosen = {"order": self.order, "solver_type": self.solver_type, "grid": self.grid}
        return {name: value for name, value in chosen.items() if value is not None}

    def table_hash(self, trained: Trained) -> str:
        """sha256 of the float64 step table, which is everything the update knows of the settings.

        Raises as `Sampler` does, before a network is there.
        """
        sampler = self.sampler(_nobody, trained, guidance=1.0, optimize=False, graph=None)
        plan = sampler.plan
        digest = hashlib.sha256(plan.table.contiguous().numpy().tobytes())
        if plan.history is not None:
            digest.update(plan.history.contiguous().numpy().tobytes())
        return digest.hexdigest()


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


def _sigmas(text: str) -> str | list[float]:
    """The numbers of "80,10,1", or the name of a grid."""
    if not any(character.isdigit() for character in text):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"grid must be a name, or sigmas with commas between, like 80,10,1; got {text!r}"
        ) from None


def _nobody(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """Stands for a network whose settings are checked."""
    return x
