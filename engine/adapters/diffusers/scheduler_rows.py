"""Rows of the step table by the rules of diffusers' schedulers, and the same update without a row.

`stepfuse.engine.table` computes rows in float64 from a schedule. Here the coefficients follow
diffusers: taken from its float32 ``alphas_cumprod``, rounded where it rounds them, between
timesteps that need not be neighbours in the list. Given float64 arrays, the same formulas are
exact. Below, a = abar where the step starts and b = abar where it ends, arrays [S] of one dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepfuse.kernels.step_row import COLUMNS, Column

Array = NDArray[Any]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_SMALLEST_VARIANCE = 1e-20


def variance(a: Array, b: Array) -> Array:
    """beta~ = (1 - b) / (1 - a) (1 - a / b): the variance of the posterior (DDPM, eq. 7)."""
    with np.errstate(all="ignore"):
        result: Array = (1 - b) / (1 - a) * (1 - a / b)
    return result


def ddim_rows(
    t: Array,
    a: Array,
    b: Array,
    prediction_type: str,
    clip: float | None,
    eta: float,
    clipped: bool,
) -> Array:
    """Rows of DDIM, eq. 12 and 16; float64 [S, 16].

    ``clipped`` re-derives epsilon from the clipped x0 (``use_clipped_model_output``).
    """
    with np.errstate(all="ignore"):
        sigma = eta * np.sqrt(variance(a, b))
        rows = _start(t, a, b, prediction_type, clip)
        _add_epsilon(rows, np.sqrt(1 - b - sigma**2), prediction_type, clipped)
    rows[:, Column.C_0] += rows[:, Column.SIGNAL_NEXT]
    rows[:, Column.SIGMA] = sigma
    return rows


def inverse_rows(t: Array, a: Array, b: Array, prediction_type: str, clip: float | None) -> Array:
    """Rows of DDIM read upward: x at a, the model evaluated at t, the result at b."""
    with np.errstate(all="ignore"):
        rows = _start(t, a, b, prediction_type, clip)
        _add_epsilon(rows, rows[:, Column.NOISE_NEXT], prediction_type, clipped=False)
    rows[:, Column.C_0] += rows[:, Column.SIGNAL_NEXT]
    return rows


def ddpm_rows(
    t: Array, a: Array, b: Array, prediction_type: str, clip: float | None, variance_type: str
) -> Array:
    """Rows of DDPM, eq. 7, with the noise of ``variance_type``; float64 [S, 16].

    SIGMA is the standard deviation, or 1 where the model's output gives it: L_0 and L_1 then hold
    the line from that output to the log variance ("learned_range", improved DDPM eq. 15).
    """
    with np.errstate(all="ignore"):
        rows = _start(t, a, b, prediction_type, clip)
        alpha = a / b
        rows[:, Column.C_0] = np.sqrt(b) * (1 - alpha) / (1 - a)
        rows[:, Column.C_X] = np.sqrt(alpha) * (1 - b) / (1 - a)
        small, large = np.maximum(variance(a, b), a.dtype.type(_SMALLEST_VARIANCE)), 1 - alpha
        rows[:, Column.VARIANCE] = large if variance_type.startswith("fixed_large") else small
        if variance_type == "learned_range":
            low, high = np.log(small), np.log(large)
            rows[:, Column.L_0], rows[:, Column.L_1] = (high + low) / 2, (high - low) / 2
        elif variance_type == "learned":
            rows[:, Column.L_1] = 1.0
        if variance_type.startswith("learned"):
            rows[:, Column.SIGMA] = 1.0
        else:
            rows[:, Column.SIGMA] = np.sqrt(rows[:, Column.VARIANCE])
    return rows


def _start(t: Array, a: Array, b: Array, prediction_type: str, clip: float | None) -> Array:
    """Rows that know where they are and how x0 is predicted, and do not move x yet."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}"
        )
    rows = np.zeros((len(t), COLUMNS))
    rows[:, Column.TIMESTEP] = t
    rows[:, Column.CLIP] = np.inf if clip is None else clip
    rows[:, Column.GUIDANCE] = 1.0
    rows[:, Column.SIGNAL], rows[:, Column.NOISE] = np.sqrt(a), np.sqrt(1 - a)
    rows[:, Column.SIGNAL_NEXT], rows[:, Column.NOISE_NEXT] = np.sqrt(b), np.sqrt(1 - b)
    signal, noise = rows[:, Column.SIGNAL], rows[:, Column.NOISE]
    if prediction_type == "epsilon":
        rows[:, Column.P_X], rows[:, Column.P_O] = 1 / signal, -noise / signal
    elif prediction_type == "sample":
        rows[:, Column.P_O] = 1.0
    else:
        rows[:, Column.P_X], rows[:, Column.P_O] = signal, -noise
    return rows


def _add_epsilon(rows: Array, weight: Array, prediction_type: str, clipped: bool) -> None:
    """Add ``weight`` eps, the model's own or, ``clipped``, that of the clipped x0."""
    signal, noise = rows[:, Column.SIGNAL], rows[:, Column.NOISE]
    if clipped:
        rows[:, Column.C_X] += weight / noise
        rows[:, Column.C_0] -= weight * signal / noise
    elif prediction_type == "epsilon":
        rows[:, Column.C_O] += weight
    elif prediction_type == "sample":
        rows[:, Column.C_X] += weight / noise
        rows[:, Column.C_O] -= weight * signal / noise
    else:
        rows[:, Column.C_X] += weight * noise
        rows[:, Column.C_O] += weight * signal


def plain_step(
    row: list[float],
    prediction_type: str,
    limit: Callable[[Tensor], Tensor],
    sample: Tensor,
    output: Tensor,
    noise: Tensor | None,
    learned: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(x_s, x0) in plain PyTorch, for what `denoise_step` cannot do.

    That is a ``limit`` of x0 that is no clamp (dynamic thresholding), a row that is not finite
    (abar = 0), tensors that are broadcast against each other or have less than two dimensions.
    """
    signal, spread = row[Column.SIGNAL], row[Column.NOISE]
    if prediction_type == "epsilon":
        x0 = (sample - spread * output) / signal  # a division, so that signal = 0 gives infinity
    elif prediction_type == "sample":
        x0 = output
    else:
        x0 = signal * sample - spread * output
    x0 = limit(x0)
    x_s = row[Column.C_0] * x0
    for weight, term in ((row[Column.C_X], sample), (row[Column.C_O], output)):
        if weight != 0:
            x_s = x_s + weight * term
    if noise is not None:
        std: float | Tensor = row[Column.SIGMA]
        if learned is not None:
            std = std * torch.exp((row[Column.L_0] + row[Column.L_1] * learned) / 2)
        x_s = x_s + std * noise
    return x_s, x0
