"""What a sampler shows of itself on the way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepfuse.engine.sampling.plan import Plan
from stepfuse.engine.sampling.program import Program


@dataclass(frozen=True)
class Step:
    """Where a sampler stands: x after step ``index``, which started at timestep ``t``.

    x and x0, the image predicted on the way, are copies: [N, C, ...].
    """

    index: int
    t: int
    x: Tensor
    x0: Tensor

    @classmethod
    def of(cls, index: int, plan: Plan, program: Program) -> Step:
        """Of a program that has just done step ``index``."""
        return cls(index, plan.timesteps[index], program.x.clone(), program.x0.clone())
