"""What a solver with a memory hands to `denoise_step`, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.checks import check_float
from stepfuse.kernels.layout import layout_of
from stepfuse.kernels.step_row import HISTORY_COLUMNS, SLOTS


def check_history(
    history: Tensor | None, history_table: Tensor | None, x: Tensor, rows: int
) -> None:
    """Raise unless both are None, or fit x [N, C, ...] and a table of so many rows.

    history: [K, N, C, ...], K = 1 .. 3, float32 (float64 for a float64 x), every slot laid out like
    x in memory. history_table: [S, 8].
    """
    if history is None and history_table is None:
        return
    if history is None or history_table is None:
        raise ValueError("history and history_table belong together: give both or neither")
    check_float("history", history)
    check_float("history_table", history_table)
    shape = tuple(history.shape)
    if shape[1:] != tuple(x.shape) or not 1 <= shape[0] <= SLOTS:
        raise ValueError(
            f"history must have shape [K, {', '.join(map(str, x.shape))}] with K in 1 .. {SLOTS}; "
            f"got {shape}"
        )
    wanted = history_dtype(x.dtype)
    if history.dtype != wanted:
        raise TypeError(f"history must be {wanted} for x in {x.dtype}; got {history.dtype}")
    layout = layout_of(x)
    dense = history[0].is_contiguous(memory_format=layout)
    if not dense or (shape[0] > 1 and history.stride(0) != x.numel()):
        kind = "contiguous" if layout is torch.contiguous_format else "channels-last"
        raise ValueError(
            f"history must be slot after slot of {kind} memory; got strides {history.stride()}"
        )
    if tuple(history_table.shape) != (rows, HISTORY_COLUMNS):
        raise ValueError(
            f"history_table must have shape [{rows}, {HISTORY_COLUMNS}], as many rows as the "
            f"table; got {tuple(history_table.shape)}"
        )
    for name, tensor in (("history", history), ("history_table", history_table)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x; got {tensor.device}")


def history_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what is remembered of an x of that dtype: as precise as the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32
