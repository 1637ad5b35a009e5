"""DPM-Solver++ multistep (Lu et al. 2022, "DPM-Solver++", algorithm 2), of order 1, 2 or 3.

    x_t = (s_t / s_s) x + a_t (1 - exp(-h)) m0 + w1 D1 + w2 D2

See `stepfuse.engine.sampling.multistep` for the weights. Order 1 is DDIM; ``strict=False`` makes
order 3 what its name says.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepfuse.engine.sampling.methods import SOLVED, Method
from stepfuse.engine.sampling.multistep import dpmpp
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.terms import table
from stepfuse.engine.sampling.update import Update


def rows(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """The table, float64 [S, 24]."""
    points = Points.down(schedule, timesteps, update)
    terms = dpmpp(points, update.solver_order, update.kind, strict=update.strict)
    return table(points, terms, update.prediction_type, update.clip_sample)


METHOD = Method(
    rows,
    takes=("grid", "strict"),
    predictions=SOLVED,
    name="dpmpp",
    orders=(2, 1, 3),
    solver_types=("midpoint", "heun"),
)
