"""The two kinds of results, ``return_dict=True`` and False, of one compiled network.

    (sample,)   ◄──►   UNet2DConditionOutput(sample=sample)

Most models of diffusers put the same tensors into either, some do not. So the second kind that is
asked for is compared once with what the model itself returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stepfuse.kernels.torch_names import pytree

Conversion = Callable[[Any], Any]
# relative L2: far above what rounding to 8 bits does to a network, far below another tensor
_SAME = 0.2


def conversion(ours: Any, theirs: Any) -> Conversion | None:
    """What makes results like ``ours`` such as ``theirs``; None where that is more than a name."""
    convert: Conversion
    if isinstance(ours, tuple) and _has_names(theirs) and len(ours) == len(theirs):
        kind, names = type(theirs), list(theirs.keys())

        def convert(results: Any) -> Any:
            return kind(**dict(zip(names, results, strict=True)))

    elif _has_names(ours):

        def convert(results: Any) -> Any:
            return results.to_tuple()

    else:
        return None
    return convert if _alike(convert(ours), theirs) else None


def _has_names(results: Any) -> bool:
    return isinstance(results, dict) and hasattr(results, "to_tuple")


def _alike(found: Any, expected: Any) -> bool:
    a, b = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    return a[1] == b[1] and all(map(_same, a[0], b[0]))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return bool((a.double() - b.double()).norm() <= _SAME * b.double().norm())
