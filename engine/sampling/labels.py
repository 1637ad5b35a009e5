"""Class labels: checked before they index a table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.kernels.arguments import check_values

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_range(
    labels: object, num_classes: int | None, dtypes: Sequence[torch.dtype] = INTEGERS
) -> None:
    """Raise unless labels are integers in 0..num_classes, the last one standing for no class.

    Reads them on the host, so that it waits for their device.

    Raises TypeError for what is no tensor, ValueError for another dtype than ``dtypes``, for a
    label out of range and for a network without classes.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a tensor of one number per sample, or None; "
            f"got {type(labels).__name__}"
        )
    if num_classes is None:
        raise ValueError("labels must be None, as the network has no classes; got a tensor")
    if labels.dtype not in dtypes:
        accepted = " or ".join(map(str, dtypes))
        raise ValueError(f"labels have dtype {labels.dtype}; accepted: {accepted}")
    check_values("labels", labels)
    wrong = labels[(labels < 0) | (labels > num_classes)]
    if wrong.numel():
        raise ValueError(
            f"labels: label {int(wrong[0])} is out of range; accepted: 0..{num_classes - 1}, "
            f"or {num_classes} for no class"
        )
