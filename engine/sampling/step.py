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
    t: float  # an int where it is whole
    x: Tensor
    x0: Tensor

    @classmethod
    def of(cls, index: int, plan: Plan, program: Program) -> Step:
        """Of a program that has just done step ``index``."""
        t = plan.timesteps[index]
        return cls(plan.left_out + index, t, program.x.clone(), program.x0.clone())
