"""What solvers that look back have in common: how often they may, and DPM-Solver++ itself.

With a = signal, s = noise, lambda = log a - log s, h = lambda_t - lambda_s, and m0, m1, m2 the x0
predicted now and before,

    x_t = (s_t / s_s) x + a_t (1 - exp(-h)) m0 + w1 D1 + w2 D2           Lu et al. 2022b, eq. 4.1

    D1  = (m0 - m1) / r0                                                 second order
    D1  = D10 + r0 / (r0 + r1) (D10 - D11),  D2 = (D10 - D11) / (r0 + r1)     third
    D10 = (m0 - m1) / r0,  D11 = (m1 - m2) / r1,  r0, r1: earlier h divided by this one
"""

from __future__ import annotations

import math

from stepfuse.engine.sampling.exponentials import tail
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms

SHORT = 15  # below so many steps the last ones are of a lower order
X0 = (0.0, 0.0, 1.0)  # what is remembered: the clipped x0


def orders(points: Points, order: int, lower_order_final: bool) -> list[int]:
    """The order of every step: no more than there are points to look back to.

    It is the first where a step starts in pure noise, ends at x_0 or does not move, and with
    ``lower_order_final`` no more than the steps that are left.
    """
    known, found = 0, []
    log_snr = points.log_snr
    for i in range(len(points)):
        known += 1
        moves = math.isfinite(log_snr[i + 1]) and log_snr[i + 1] > log_snr[i]
        if not math.isfinite(log_snr[i]):
            known = 0  # nothing can be compared with this point, it is infinitely far
        left = len(points) - i if lower_order_final else order
        found.append(max(1, min(order, known, left)) if moves else 1)
    return found


def dpmpp(
    points: Points,
    order: int = 2,
    solver_type: str = "midpoint",
    *,
    stochastic: bool = False,
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
    strict: bool = True,
) -> list[Terms]:
    """The terms of DPM-Solver++, or of its SDE, multistep.

    Args:
        order: 1 (DDIM), 2 or 3.
        solver_type: of order 2: "midpoint" or "heun", w1 = phi_1 / 2 or phi_2.
        stochastic: the SDE: h becomes 2 h in the weights, and x is also multiplied by exp(-h).
        lower_order_final: the last step is of order 1 and the one before of order 2; None does it
            below 15 steps.
        euler_at_final: the last step is of order 1.
        strict: w2 as everybody has it, -phi_3. D2 is half of the second derivative, so that a
            solver of third order needs -2 phi_3: with False it has that.
    """
    short = len(points) < SHORT if lower_order_final is None else lower_order_final
    order_of = orders(points, order, short)
    if euler_at_final:
        order_of[-1] = 1
    log_snr, found = points.log_snr, []
    a, s = points.signal.tolist(), points.noise.tolist()
    for i in range(len(points)):
        h = log_snr[i + 1] - log_snr[i]
        span = 2 * h if stochastic else h
        row = Terms(i, i + 1, remember=X0)
        row.x = s[i + 1] / s[i] * (math.exp(-h) if stochastic else 1.0)
        row.x0 = -a[i + 1] * math.expm1(-span)
        if stochastic:
            row.sigma = s[i + 1] * math.sqrt(-math.expm1(-span))
        if order_of[i] > 1:
            midpoint = order_of[i] == 2 and solver_type == "midpoint"
            first = row.x0 / 2 if midpoint else a[i + 1] * tail(-span, 2) / span
            _look_back(row, first, (log_snr[i] - log_snr[i - 1]) / h)
        if order_of[i] > 2:
            second = -a[i + 1] * tail(-span, 3) / span**2 * (1 if strict else 2)
            if strict and stochastic:
                second -= a[i + 1]  # + 1/2 in phi_3 became - 1/2 there
            before = [log_snr[i - k] - log_snr[i - k - 1] for k in range(2)]
            _curve(row, first, second, before[0] / h, before[1] / h)
        found.append(row)
    return found


def _look_back(row: Terms, weight: float, r0: float) -> None:
    """Add weight (m0 - m1) / r0."""
    row.x0 += weight / r0
    row.look_back(1, -weight / r0)


def _curve(row: Terms, first: float, second: float, r0: float, r1: float) -> None:
    """Add the second differences: (first r0 / (r0 + r1) + second / (r0 + r1)) (D10 - D11)."""
    weight = (first * r0 + second) / (r0 + r1)
    _look_back(row, weight, r0)
    row.look_back(1, -weight / r1)
    row.look_back(2, weight / r1)
