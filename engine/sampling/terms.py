"""A solver's steps as sums, and the table that is written from them.

    x_s = x_ x + o_ o + x0_ x0 + sum_k h_k (what was remembered k steps ago) + sigma z

is one `Terms`. A solver is a function that gives one for every evaluation of the model; `table`
writes them as rows of `stepfuse.kernels.step_row`, with what is remembered in a ring of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.rows import Rows
from stepfuse.kernels.step_row import COLUMNS, HISTORY_COLUMNS, SLOTS, Column, HistoryColumn

COUNTERS = 2**20  # where the noise counters of rows begin that have no timestep of their own
Weights = tuple[float, float, float]  # of x, of the model's output and of the clipped x0


@dataclass
class Terms:
    """One row: the weights of everything in x at point ``end``, the model being asked at ``start``.

    Args:
        start, end: numbers of points.
        x, out, x0: weights of x, of the model's output and of the x0 it means.
        history: weight of what was remembered k times ago, by k = 1, 2, 3.
        remember: the weights of x, the output and x0 in what is remembered now, or None.
        sigma: weight of the noise.
    """

    start: int
    end: int
    x: float = 0.0
    out: float = 0.0
    x0: float = 0.0
    history: dict[int, float] = field(default_factory=dict)
    remember: Weights | None = None
    sigma: float = 0.0

    def add(self, weights: Weights, times: float) -> None:
        """Add something that is made of x, the output and x0, so many times."""
        self.x += times * weights[0]
        self.out += times * weights[1]
        self.x0 += times * weights[2]

    def look_back(self, ago: int, weight: float) -> None:
        """Add what was remembered so many times ago."""
        self.history[ago] = self.history.get(ago, 0.0) + weight


def table(
    points: Points,
    terms: Sequence[Terms],
    prediction_type: str,
    clip: float | None,
    keep: int | None = None,
) -> Tensor:
    """The rows, float64 [R, 24]: those of `Column`, then those of `HistoryColumn`.

    What is remembered k times ago stands in slot (number - k) modulo K, K being the largest k that
    a row asks for; what nobody asks for again is not written. ``keep`` is another K, no smaller,
    for all that is remembered to be written. Raises ValueError for K > 3.
    """
    slots = max((ago for row in terms for ago, weight in row.history.items() if weight), default=0)
    slots = slots if keep is None else keep
    if slots > SLOTS:
        raise ValueError(f"a row can look back {SLOTS} times; got {slots}")
    starts = [row.start for row in terms]
    ends = [row.end for row in terms]
    signal, noise = points.signal[starts], points.noise[starts]
    times = points.timesteps[starts]
    rows = Rows(counters(times), None, None, clip)
    rows.between((signal, noise), (points.signal[ends], points.noise[ends]))
    rows.predict(prediction_type, size=torch.hypot(signal, noise))
    history = torch.zeros(len(terms), HISTORY_COLUMNS, dtype=torch.float64)
    history[:, HistoryColumn.TIME] = times
    history[:, HistoryColumn.WRITE] = -1
    writers: list[int] = []  # the rows that remember something
    for number, row in enumerate(terms):
        for column, value in (
            (Column.C_X, row.x),
            (Column.C_O, row.out),
            (Column.C_0, row.x0),
            (Column.SIGMA, row.sigma),
        ):
            rows.table[number, column] = value
        for ago, weight in row.history.items():
            if weight:
                slot = (len(writers) - ago) % slots
                history[number, HistoryColumn.C_H0 + slot] = weight
                history[writers[-ago], HistoryColumn.WRITE] = slot
        if row.remember is not None:
            h_x, h_o, h_0 = row.remember
            history[number, HistoryColumn.H_X] = h_x
            history[number, HistoryColumn.H_O] = h_o
            history[number, HistoryColumn.H_0] = h_0
            if keep is not None:
                history[number, HistoryColumn.WRITE] = len(writers) % keep
            writers.append(number)
    unread = history[:, HistoryColumn.WRITE] < 0
    history[unread, HistoryColumn.H_X : HistoryColumn.H_0 + 1] = 0
    return torch.cat([rows.table, history], dim=1)


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(table [R, 16], history table [R, 8]) of the rows of `table`, for `denoise_step`."""
    return rows[:, :COLUMNS].contiguous(), rows[:, COLUMNS:].contiguous()


def slots_of(history: Tensor) -> int:
    """K: how many slots the rows of a history table, [R, 8], read or write."""
    read = [slot + 1 for slot in range(SLOTS) if bool((history[:, slot] != 0).any())]
    return max([*read, int(history[:, HistoryColumn.WRITE].max()) + 1], default=0)


def counters(times: Tensor) -> Tensor:
    """What noise is counted by, [R]: no two rows have the same.

    The timesteps, where they are whole and differ; numbers from 2^20 on otherwise.
    """
    alone = len(set(times.tolist())) == len(times)
    if alone and bool((times == times.floor()).all()):
        return times
    return COUNTERS + torch.arange(len(times), dtype=torch.float64)


def epsilon(points: Points, at: int, prediction_type: str, rederive: bool) -> Weights:
    """The noise in x at a point, made of x, the model's output and x0.

    ``rederive`` takes it from the clipped x0, otherwise it is what the model says.
    """
    a, s = float(points.signal[at]), float(points.noise[at])
    if rederive:
        return 1 / s, 0.0, -a / s
    if prediction_type == "epsilon":
        return 0.0, 1.0, 0.0
    if prediction_type == "v_prediction":
        size = (a * a + s * s) ** 0.5
        return s / size**2, a / size, 0.0
    if prediction_type == "flow_prediction":
        return 1 / (a + s), a / (a + s), 0.0
    return 1 / s, -a / s, 0.0
