"""Weights in another order of memory: filters that are read channels-last lie channels-last.

    before     weight [O, I, h, w], strides (I h w, h w, w, 1)    a copy beside it: both are held
    after      weight [O, I, h, w], strides (I h w, 1, w I, I)    read where it lies

The parameter stays what it is: its shape, dtype and values, state_dict, copies, pickles and
``load_state_dict`` work as ever. Only strides change, by which the model itself may get another
kernel, which adds in another order, and which a file format may refuse to write. A weight whose
memory somebody else holds, a state_dict or a view, stays: theirs and the model's would be two from
then on.

As with `parked`, nothing moves while other threads run Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from stepfuse.engine.compile.weights.parked import PLAIN, is_alone, other_threads
from stepfuse.kernels.torch_names import FakeTensor

_before: Any = WeakIdKeyDictionary()  # the strides that a turned weight had


def obstacle(weight: Tensor) -> str:
    """Why ``weight``, of which nobody here may hold a tensor, cannot be turned, or ""."""
    if type(weight) not in (*PLAIN, FakeTensor) or weight.layout is not torch.strided:
        return "it is no ordinary tensor"
    if weight.is_conj() or weight.is_neg():
        return "it is no ordinary tensor"
    # of memory on other devices it is always said that it is shared
    if weight.device.type == "cpu" and weight.untyped_storage().is_shared():
        return "its memory is shared by processes"
    if weight.untyped_storage().nbytes() != weight.nbytes or not is_alone(weight):
        return "its memory is held by others too"
    others = other_threads()
    return f"thread {others[0]!r} may be reading it" if others else ""


def turn(weight: Tensor, layout: torch.memory_format) -> None:
    """Let ``weight``, for which there is no `obstacle`, lie in ``layout``."""
    strides = weight.stride()
    # of the same kind: a weight that counts its versions or one of inference mode
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.data = torch.clone(weight.detach(), memory_format=layout)
    _before.setdefault(weight, strides)


def is_turned(weight: Tensor) -> bool:
    """Whether its strides are not those that its model gave it."""
    return weight in _before


def turn_back(weights: Iterable[Tensor], forced: bool = False) -> list[Tensor]:
    """Let those that were turned lie as before; which did.

    One whose memory others hold by now stays, unless that is ``forced``.
    """
    done = []
    for weight in weights:
        strides = _before.get(weight)
        if strides is None or not (forced or is_alone(weight)):
            continue
        del _before[weight]
        if weight.untyped_storage().nbytes() != weight.nbytes:
            continue  # it was given other memory since
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            old = weight.detach()
            weight.data = torch.empty_strided(
                old.shape, strides, dtype=old.dtype, device=old.device
            ).copy_(old)
        done.append(weight)
    return done
