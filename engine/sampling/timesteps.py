"""Which of the T training timesteps a sampler visits.

Every function returns indices on the training schedule, descending, without repetitions: two equal
indices in a row would evaluate the network twice for one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from stepfuse.kernels.arguments import as_list, check_literal
from stepfuse.kernels.checks import as_integer, as_number, received

Spacing = Literal["leading", "trailing", "linspace", "quadratic"]


def spaced_timesteps(
    num_train_timesteps: int,
    steps: int | str,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
) -> list[int]:
    """S of the T training timesteps, descending.

    With c = T / S and i = 0 .. S-1, before sorting:

        leading     i floor(c) + steps_offset           (DDIM's linear tau, section 4.2)
        trailing    round(T - i c) - 1                  (Lin et al. 2024, table 2)
        linspace    round(i (T - 1) / (S - 1))          (improved DDPM, section 4)
        quadratic   floor((T - 1) i^2 / (S - 1)^2)      (DDIM's quadratic tau, section D.2)

    Rounding is half to even. ``steps`` may be a string of guided-diffusion instead: "50" spaces 50
    steps from 0 to T-1, "10,15,20" does so in three equal sections, "ddim50" takes every c-th and
    refuses where no whole stride gives that many.

    Raises ValueError for S < 1, S > T, an unknown spacing or an offset outside 0 .. T-1, or with
    which the last timestep would be past T-1; TypeError for numbers that are not ints.
    """
    total = as_integer("num_train_timesteps", num_train_timesteps)
    if total < 1:
        raise ValueError(f"num_train_timesteps must be at least 1; got {total}")
    if total >= 2**24:
        raise ValueError(f"num_train_timesteps must be below 2^24; got {total}")
    check_literal("spacing", spacing, Spacing)
    steps_offset = as_integer("steps_offset", steps_offset)
    if not 0 <= steps_offset < total:
        raise ValueError(f"steps_offset must be in 0 .. {total - 1}; got {steps_offset}")
    if isinstance(steps, str):
        return sorted(set(_sections(total, steps)), reverse=True)
    try:
        steps = as_integer("steps", steps)
    except TypeError:
        raise TypeError(
            f"steps must be an int or a string like 'ddim50'; got {received(steps)}"
        ) from None
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be in 1 .. {total} (num_train_timesteps); got {steps}")
    if spacing == "leading":
        stride = total // steps
        largest = total - 1 - (steps - 1) * stride
        if steps_offset > largest:
            raise ValueError(
                f"steps_offset must be in 0 .. {largest} for {steps} of {total} timesteps: those "
                f"past {total - 1} would be lost; got {steps_offset}"
            )
        chosen = [i * stride + steps_offset for i in range(steps)]
    elif spacing == "trailing":
        # the stride that numpy.arange finds for diffusers: it decides which way a half is rounded
        stride_back = total - (total - total / steps)
        chosen = [round(total - i * stride_back) - 1 for i in range(steps)]
    elif spacing == "linspace":
        stride_exact = (total - 1) / max(steps - 1, 1)
        chosen = [round(i * stride_exact) for i in range(steps)]
    else:  # quadratic
        last = max(steps - 1, 1) ** 2
        chosen = [(total - 1) * i * i // last for i in range(steps)]
    return sorted(set(chosen), reverse=True)


def check_timesteps(
    timesteps: Sequence[float], num_train_timesteps: int, whole: bool = True, lowest: int = 0
) -> list[float]:
    """A caller's own timesteps: whole numbers, descending, in 0 .. T-1; ValueError otherwise.

    Numbers of arrays and tensors will do, floats too where they are whole, and with ``whole=False``
    where they are not. ``lowest`` is that of another range of T.
    """
    chosen = [_number(t, whole) for t in as_list("timesteps", timesteps, "a list of indices")]
    if not chosen:
        raise ValueError("timesteps must name at least one index; got an empty list")
    if any(a <= b for a, b in pairwise(chosen)):
        raise ValueError(f"timesteps must descend without repetition; got {chosen}")
    highest = lowest + num_train_timesteps - 1
    if chosen[0] > highest or chosen[-1] < lowest:
        raise ValueError(
            f"timesteps must be in {lowest} .. {highest}; got {chosen[-1]} .. {chosen[0]}"
        )
    return chosen


def _number(timestep: Any, whole: bool) -> float:
    number = timestep.item() if isinstance(timestep, Tensor) else timestep
    value = as_number("timesteps", number)
    if value == int(value):
        return int(value)
    if whole:
        raise ValueError(f"timesteps must be whole numbers; got {received(number)}")
    return value


def _sections(total: int, spec: str) -> list[int]:
    """Indices of a guided-diffusion string, ascending by section."""
    text = spec.removeprefix("ddim")
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"steps must read like '50', '10,15,20' or 'ddim50'; got {spec!r}"
        ) from None
    if min(counts) < 1:
        raise ValueError(f"steps must be at least 1 in every section; got {spec!r}")
    if spec.startswith("ddim"):
        return _whole_stride(total, counts, spec)
    chosen: list[int] = []
    start = 0
    for number, count in enumerate(counts):
        size = total // len(counts) + (number < total % len(counts))
        if count > size:
            raise ValueError(f"section {number} of {spec!r} has {size} timesteps, not {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            # summed, not multiplied: the rounding of halves depends on it
            chosen.append(start + round(position))
            position += stride
        start += size
    return chosen


def _whole_stride(total: int, counts: list[int], spec: str) -> list[int]:
    # a stride of T, which leaves index 0 alone, is none: guided-diffusion refuses it too
    for stride in range(1, total):
        chosen = range(0, total, stride)
        if counts == [len(chosen)]:
            return list(chosen)
    raise ValueError(f"no whole stride over {total} timesteps gives {spec!r}")
