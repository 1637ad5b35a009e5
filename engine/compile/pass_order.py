"""The passes, in the order in which they are applied, and what is asked of a user's own."""

from __future__ import annotations

import inspect
import pickle
from collections import Counter
from typing import Any

from stepfuse.engine.compile.graph import Pass
from stepfuse.engine.compile.passes.attention import attention
from stepfuse.engine.compile.passes.channels_last import channels_last
from stepfuse.engine.compile.passes.concatenate import concatenate
from stepfuse.engine.compile.passes.convolution_forms import convolution_forms
from stepfuse.engine.compile.passes.fold_group_norm import fold_group_norm
from stepfuse.engine.compile.passes.fuse_group_norm_silu import fuse_group_norm_silu
from stepfuse.engine.compile.passes.fuse_residual_add import fuse_residual_add
from stepfuse.engine.compile.passes.gather_attention import gather_attention
from stepfuse.engine.compile.passes.hoist_timestep import hoist_timestep
from stepfuse.engine.compile.passes.lower_precision import lower_precision
from stepfuse.engine.compile.passes.merge_linears import merge_linears
from stepfuse.engine.compile.passes.prepack_convolutions import prepack_convolutions
from stepfuse.engine.compile.passes.read_side_by_side import read_side_by_side
from stepfuse.engine.compile.passes.remove_no_ops import remove_no_ops
from stepfuse.engine.compile.passes.upsampled_convolutions import upsampled_convolutions
from stepfuse.engine.compile.passes.widen_conv1d import widen_conv1d
from stepfuse.kernels.checks import received

PASSES: tuple[Pass, ...] = (
    remove_no_ops,
    widen_conv1d,
    gather_attention,
    fuse_group_norm_silu,
    hoist_timestep,
    merge_linears,
    channels_last,  # before operators are asked in which dtypes they run: layouts matter
    lower_precision,
    concatenate,
    attention,
    upsampled_convolutions,
    convolution_forms,
    fold_group_norm,
    read_side_by_side,
    prepack_convolutions,
    fuse_residual_add,
)


def as_passes(values: Any) -> tuple[Pass, ...]:
    """``values`` as passes. TypeError for what is no tuple or list of functions
    ``(gm, context) -> PassReport``, ValueError where two have one name.
    """
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"passes must be a tuple of functions, like PASSES; got {received(values)}")
    for value in values:
        name = getattr(value, "__name__", None)
        if not callable(value) or isinstance(value, type) or not isinstance(name, str):
            raise TypeError(f"passes must be functions with a name; got {received(value)}")
        if not _takes_two(value):
            raise TypeError(f"passes must take (gm, context); got {name}{inspect.signature(value)}")
    for name, count in Counter(value.__name__ for value in values).items():
        if count > 1:
            raise ValueError(f"passes must have a name each; got {count} of the name {name!r}")
    return tuple(values)


def _takes_two(value: Any) -> bool:
    try:
        inspect.signature(value).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # written in C, with nothing to look at
        return True
    return True


class PickledPasses:
    """Passes inside a pickle: raises TypeError that names the one that cannot be there."""

    def __init__(self, passes: tuple[Pass, ...]) -> None:
        self.passes = passes

    def __deepcopy__(self, memo: dict[int, Any]) -> PickledPasses:
        return self  # of functions there are no copies

    def __reduce__(self) -> Any:
        for pass_ in self.passes:
            try:
                pickle.dumps(pass_)
            except Exception as error:
                text = " ".join(str(error).split())
                raise TypeError(
                    f"cannot pickle this Optimized: its pass {pass_.__name__!r} does not let "
                    f"itself be: {text}"
                ) from error
        return type(self), (self.passes,)
