"""Rows of the step table by the rules of diffusers' schedulers, and the same update without a row.

`stepfuse.engine.sampling.rows` computes rows in float64 from a schedule. Here the coefficients
follow diffusers: taken from its float32 ``alphas_cumprod``, rounded where it rounds them, between
timesteps that need not be neighbours in the list. Given float64 tensors, the same formulas are
exact. They are computed by PyTorch, whose float32 square root differs from NumPy's in the last bit.
Below, a = abar where the step starts and b = abar where it ends, CPU tensors [S] of one dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepfuse.engine.sampling.rows import (
    SMALLEST_VARIANCE,
    Rows,
    posterior_mean,
    posterior_variance,
)
from stepfuse.kernels.step_row import Column

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def ddim_rows(
    t: Tensor,
    a: Tensor,
    b: Tensor,
    prediction_type: str,
    clip: float | None,
    eta: float,
    clipped: bool,
) -> Tensor:
    """Rows of DDIM, eq. 12 and 16; float64 [S, 16].

    ``clipped`` re-derives epsilon from the clipped x0 (``use_clipped_model_output``).
    """
    sigma = eta * posterior_variance(a, b).sqrt()
    rows = _start(t, a, b, prediction_type, clip)
    rows.implicit(b.sqrt(), (1 - b - sigma**2).sqrt(), sigma, clipped)
    return rows.table


def inverse_rows(
    t: Tensor, a: Tensor, b: Tensor, prediction_type: str, clip: float | None
) -> Tensor:
    """Rows of DDIM read upward: x at a, the model evaluated at t, the result at b."""
    rows = _start(t, a, b, prediction_type, clip)
    rows.implicit(b.sqrt(), (1 - b).sqrt(), 0.0, False)
    return rows.table


def ddpm_rows(
    t: Tensor, a: Tensor, b: Tensor, prediction_type: str, clip: float | None, variance_type: str
) -> Tensor:
    """Rows of DDPM, eq. 7, with the noise of ``variance_type``; float64 [S, 16].

    SIGMA is the standard deviation, or 1 where the model's output gives it: L_0 and L_1 then hold
    the line from that output to the log variance ("learned_range", improved DDPM eq. 15).
    """
    rows = _start(t, a, b, prediction_type, clip)
    rows.ancestral(posterior_mean(a, b))
    small, large = posterior_variance(a, b).clamp(min=SMALLEST_VARIANCE), 1 - a / b
    fixed = large if variance_type.startswith("fixed_large") else small
    rows.noised(fixed.sqrt(), fixed)
    if variance_type.startswith("learned"):
        rows.learned(small.log(), large.log(), variance_type == "learned_range")
    return rows.table


def _start(t: Tensor, a: Tensor, b: Tensor, prediction_type: str, clip: float | None) -> Rows:
    """Rows that know where they are and how x0 is predicted, and do not move x yet."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; got {prediction_type!r}"
        )
    rows = Rows(t, a, b, clip)
    rows.predict(prediction_type)
    return rows


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
