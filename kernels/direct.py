"""What to call for an operator where nobody watches: the shortest way to its kernel.

A recorded step and a compiled network call the same operators again and again with arguments of the
same kind. The dispatcher's way there and back takes 5 to 15 us for an operator of ours; what takes
its place is said where the operator is defined (`registration.define`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stepfuse.kernels.registration import OPERATORS


def directly(target: Any) -> Callable[..., Any]:
    """For one place in a straight line of calls; same arguments and result as ``target``."""
    ours = OPERATORS.get(target)
    if ours is not None and ours.direct is not None:
        return ours.direct()
    call: Callable[..., Any] = getattr(target, "_op", target)  # skips a Python frame per call
    return call


def blank(target: Any, result: Any) -> Tensor | None:
    """A tensor without memory like ``result``, for an operator that `directly` lets put it into
    ``out``; None for other operators.
    """
    ours = OPERATORS.get(target)
    return None if ours is None or ours.blank is None else ours.blank(result)
