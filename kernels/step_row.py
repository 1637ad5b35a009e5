"""One row of the step table: everything one sampler update needs to know, as 16 numbers.

With ``o`` the model output (after guidance), ``w`` its variance half and ``z`` normal noise,

    o   = o_uncond + GUIDANCE (o_cond - o_uncond)
    x0  = clamp(P_X x + P_O o, -CLIP, CLIP)
    std = SIGMA exp((L_0 + L_1 w) / 2)              SIGMA alone where the variance is not learned
    x_s = C_X x + C_O o + C_0 x0 + std z

The rows are computed in float64 by `stepfuse.engine.sampling.rows` and rounded once. A re-derived
epsilon is already folded into C_X and C_0, the model's own epsilon into C_X and C_O, so that
neither costs an instruction in a kernel. Where SIGMA is 0 no noise is added, and a fast backend
draws none, so that one captured step serves eta = 0 too. 16 float32 numbers are one cache line.
Timesteps are exact below 2^24.

A solver with a memory has 8 more numbers in every row, `HistoryColumn`, and up to three tensors h
of the shape of x:

    x_s = C_X x + C_O o + C_0 x0 + C_H0 h_0 + C_H1 h_1 + C_H2 h_2 + std z
    h_w <- H_X x + H_O o + H_0 x0                   with x before the update and w = WRITE

An h whose weight is 0 is not read, so that it may hold anything. Which h holds what is a matter of
the rows: nothing is moved from one to the next.
"""

from __future__ import annotations

from enum import IntEnum


class Column(IntEnum):
    """Where each number stands in a row."""

    P_X = 0
    P_O = 1
    C_X = 2
    C_O = 3
    C_0 = 4
    SIGMA = 5
    CLIP = 6
    L_0 = 7
    L_1 = 8
    GUIDANCE = 9
    TIMESTEP = 10  # noise counter: the index on the training schedule, where the rows have one each
    SIGNAL = 11  # sqrt(abar) and sqrt(1 - abar) where the step starts ...
    NOISE = 12
    SIGNAL_NEXT = 13  # ... and where it ends
    NOISE_NEXT = 14
    VARIANCE = 15  # of the reverse step, for a guided mean


class HistoryColumn(IntEnum):
    """Where each number stands in the second part of a row."""

    C_H0 = 0  # weights of the history in x_s
    C_H1 = 1
    C_H2 = 2
    H_X = 3  # what is remembered of this step
    H_O = 4
    H_0 = 5
    WRITE = 6  # where it is written, -1 for nowhere
    TIME = 7  # what the model is given for t, read on the host alone


COLUMNS = len(Column)
HISTORY_COLUMNS = len(HistoryColumn)
SLOTS = 3  # most that a row can read
