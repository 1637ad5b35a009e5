"""UniPC multistep, predictor and corrector of order 1, 2 or 3 (Zhao et al. 2023, algorithms 1, 2).

With hh = -h, phi_1 = exp(hh) - 1 and B = hh ("bh1") or phi_1 ("bh2"),

    predictor   x_t = (s_t / s_s) y - a_t phi_1 m0 - a_t B sum_k rho_k (m_k - m0) / r_k
    corrector   y   = (s_t / s_s) y_s - a_t phi_1 m0 - a_t B (sum_k rho_k (m_k - m0) / r_k
                                                              + rho_p (m_t - m0))

The corrector of a step is made when the next one knows m_t. Its first two terms are those of the
predictor, so that y is x less the predictor's sum, plus the corrector's: a sum over what is
remembered, and no second x is needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from stepfuse.engine.sampling.exponentials import tail
from stepfuse.engine.sampling.methods import SOLVED, Method
from stepfuse.engine.sampling.multistep import X0, orders
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.terms import Terms, table
from stepfuse.engine.sampling.update import Update


def unipc(
    points: Points,
    order: int = 2,
    solver_type: str = "bh2",
    *,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> list[Terms]:
    """The terms of UniPC.

    Args:
        order: 1, 2 or 3; the result is of one order more where the corrector runs.
        solver_type: "bh1" or "bh2".
        lower_order_final: no step is of a higher order than there are steps left.
        disable_corrector: numbers of the steps whose result is not corrected.
    """
    order_of = orders(points, order, lower_order_final)
    a, s, log_snr = points.signal.tolist(), points.noise.tolist(), points.log_snr
    found: list[Terms] = []
    for i in range(len(points)):
        row = Terms(i, i + 1, x=s[i + 1] / s[i], remember=X0)
        if i > 0 and i - 1 not in disable_corrector and math.isfinite(log_snr[i - 1]):
            _correct(row, points, i, order_of[i - 1], solver_type)
        h = log_snr[i + 1] - log_snr[i]
        row.x0 -= a[i + 1] * math.expm1(-h)
        if order_of[i] > 1:
            ratios, _, rho, b = _weights(log_snr, i, order_of[i], solver_type)
            for k, (r, weight) in enumerate(zip(ratios, rho, strict=True), 1):
                row.look_back(k, -a[i + 1] * b * weight / r)
                row.x0 += a[i + 1] * b * weight / r
        found.append(row)
    return found


def _correct(row: Terms, points: Points, i: int, order: int, solver_type: str) -> None:
    """Add what makes x the corrected one: both sums of step i - 1, times x's own weight."""
    ratios, corrector, predictor, b = _weights(points.log_snr, i - 1, order, solver_type)
    scale = -float(points.signal[i]) * b * row.x
    for k, r in enumerate(ratios, 1):
        weight = scale * (corrector[k - 1] - predictor[k - 1]) / r
        row.look_back(k + 1, weight)
        row.look_back(1, -weight)
    row.x0 += scale * corrector[-1]
    row.look_back(1, -scale * corrector[-1])


def _weights(
    log_snr: list[float], i: int, order: int, solver_type: str
) -> tuple[list[float], list[float], list[float], float]:
    """(r_k, rho of the corrector, rho of the predictor, B) of step i: order - 1, order, order - 1.

    rho solves sum_k rho_k r_k^(n-1) = n! phi_n / B, n = 1 .. order, where r of the new point is 1;
    of one unknown it is 1/2, as the paper's code has it.
    """
    h = log_snr[i + 1] - log_snr[i]
    b = -h if solver_type == "bh1" else math.expm1(-h)
    ratios = [(log_snr[i - k] - log_snr[i]) / h for k in range(1, order)]
    powers = np.vander([*ratios, 1.0], order, increasing=True).T
    target = np.array(
        [math.factorial(n) * tail(-h, n + 1) / (-h) ** n / b for n in range(1, order + 1)]
    )
    half = [0.5]
    corrector = half if order == 1 else np.linalg.solve(powers, target).tolist()
    predictor = half if order == 2 else np.linalg.solve(powers[:-1, :-1], target[:-1]).tolist()
    return ratios, corrector, predictor, b


def rows(schedule: Schedule, timesteps: Sequence[float], update: Update) -> Tensor:
    """The table, float64 [S, 24]."""
    points = Points.down(schedule, timesteps, update)
    terms = unipc(points, update.solver_order, update.kind)
    return table(points, terms, update.prediction_type, update.clip_sample)


METHOD = Method(
    rows,
    takes=("grid",),
    predictions=SOLVED,
    name="unipc",
    orders=(2, 1, 3),
    solver_types=("bh2", "bh1"),
)
