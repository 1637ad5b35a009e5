"""How a network is sampled: the words of the command line, and the sampler they mean."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepfuse.engine.generate.typed import settle
from stepfuse.engine.sampling.guidance.cfg import CFG
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.schedule import Schedule

Optimize = Literal["off", "float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """Settings of a `Sampler` that can be written down.

    Attributes:
        method, steps, spacing, eta, backend: see `Sampler`; a string of digits is a number.
        order, solver_type, grid: see `Sampler`, too; numbers with commas between are sigmas.
        guidance: classifier-free; 1 is none.
        optimize: "off", or the type of matrix products that the network is compiled for.
    """

    method: str = "ddim"
    steps: str = "50"
    spacing: str = "leading"
    eta: float = 0.0
    guidance: float = 1.0
    optimize: Optimize = "off"
    backend: str = "auto"
    order: int | None = None
    solver_type: str | None = None
    grid: str | None = None

    def __post_init__(self) -> None:
        settle(self)

    def sampler(
        self,
        model: Any,
        schedule: Schedule,
        prediction_type: str,
        learned_variance: bool,
        *,
        guidance: float | None = None,
        **overrides: Any,
    ) -> Sampler:
        """The sampler; its errors name the setting, the value and what is accepted.

        ``guidance`` stands for the recipe's own where it is given.
        """
        settings = {
            "method": self.method,
            "steps": _number(self.steps),
            "spacing": self.spacing,
            "eta": self.eta,
            "prediction_type": prediction_type,
            "variance_type": "learned_range" if learned_variance else "fixed_small",
            "guidance": steering(self.guidance if guidance is None else guidance),
            "backend": self.backend,
            "optimize": compiled_for(self.optimize),
            **self.solver(),
            **overrides,
        }
        if self.grid is not None:
            settings["grid"] = _sigmas(self.grid)
        return Sampler(model, schedule, **settings)

    def solver(self) -> dict[str, Any]:
        """What was chosen of order, type and grid, by name: most methods have nothing of these."""
        chosen = {"order": self.order, "solver_type": self.solver_type, "grid": self.grid}
        return {name: value for name, value in chosen.items() if value is not None}

    def table_hash(self, schedule: Schedule, prediction_type: str, learned_variance: bool) -> str:
        """sha256 of the float64 step table, which is everything the update knows of the settings.

        Raises as `Sampler` does, before a network is there.
        """
        overrides = {"optimize": False, "graph": None}
        sampler = self.sampler(
            _nobody, schedule, prediction_type, learned_variance, guidance=1.0, **overrides
        )
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


def _number(text: str) -> int | str:
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
