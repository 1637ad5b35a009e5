"""What a caller asked to be sampled: checked once, then cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.sampling.condition import check_condition, check_replacement, split_condition
from stepfuse.engine.sampling.denoiser import Condition
from stepfuse.engine.sampling.guidance.protocol import Guidance, Steering
from stepfuse.kernels import philox
from stepfuse.kernels.arguments import as_sizes, check_callable, check_floats, check_values
from stepfuse.kernels.checks import (
    as_integer,
    as_number,
    check_flag,
    check_real,
    per_sample,
    sample_indices,
)
from stepfuse.kernels.memory import history_dtype
from stepfuse.kernels.torch_names import tree_leaves


@dataclass
class Part:
    """Samples ``start`` .. ``stop`` - 1 of a request, ready to be run from row ``first_row``.

    ``replacement`` makes the condition the unconditional one, see `check_replacement`.
    """

    start: int
    stop: int
    x: Tensor
    seeds: Tensor
    samples: Tensor
    condition: dict[str, Any]
    replacement: dict[str, Any] | None
    noise: Tensor | None
    image: Tensor | None
    image_noise: Tensor | None
    mask: Tensor | None
    first_row: int
    measurement: Tensor | None = None


class Request:
    """The arguments of `Sampler.sample`, checked against each other and the table.

    Args:
        timesteps: where steps start, descending.
        rows: how many rows the table has, at least one for each of them.
        last: the last timestep of the schedule.
        level: gives (signal, noise) of x = signal x0 + noise eps at a timestep.
        device, dtype, backend: of x.
        guidance: whose unconditional entries are checked against the condition.
        The rest is documented in `Sampler.sample`.

    Raises ValueError or TypeError naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        timesteps: Sequence[float],
        rows: int,
        last: int,
        level: Callable[[float], tuple[float, float]],
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        guidance: Guidance | None,
        shape: Sequence[int],
        seed: int | Tensor = 0,
        first_index: int | Tensor = 0,
        condition: Condition | None = None,
        x_T: Tensor | None = None,
        noise: Tensor | None = None,
        start: int | None = None,
        image: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        measurement: Tensor | None = None,
    ) -> None:
        self.shape = _checked_shape(shape)
        self.timesteps, self.last, self.level = timesteps, last, level
        self.device, self.dtype, self.backend = device, dtype, backend
        count = self.shape[0]
        self.seeds = per_sample("seed", seed, count, device)
        self.samples = sample_indices(first_index, count, device, "first_index")
        self.condition = check_condition(condition, count, device)
        steering = Steering.of(guidance)
        self.replacement = replacement(self.condition, steering, count, device)
        self.measurement = self._measured(measurement, steering)
        self.x_T = self._like_x("x_T", x_T, self.shape)
        self.noise = self._like_x("noise", noise, (rows, *self.shape))
        self.image = self._like_x("image", image, self.shape)
        self.mask = self._mask(mask)
        self.first = self._first(start, strength)
        self.first_row = self.first  # of the table that is used

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [leaf for leaf in tree_leaves(vars(self)) if isinstance(leaf, Tensor)]

    def parts(self, batch_size: int | None) -> Iterator[Part]:
        """Batches of at most ``batch_size`` samples, in order."""
        count = self.shape[0]
        if batch_size is not None:
            batch_size = as_integer("batch_size", batch_size, "an int or None")
            if batch_size < 1:
                raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        size = min(batch_size or count, count)
        for start in range(0, count, size):
            yield self._part(start, min(start + size, count))

    def _part(self, start: int, stop: int) -> Part:
        cut = slice(start, stop)
        seeds, samples = self.seeds[cut], self.samples[cut]
        image = None if self.image is None else self.image[cut]
        x = None if self.x_T is None else self.x_T[cut]
        drawn = None
        if x is None or image is not None:
            drawn = philox.normal(
                seeds, samples, philox.INITIAL, self.shape[1:], self.backend, dtype=self.dtype
            )
        if x is None:
            assert drawn is not None
            x = drawn if image is None else self._noised(image, drawn)
        return Part(
            start,
            stop,
            x,
            seeds,
            samples,
            split_condition(self.condition, start, stop),
            split_condition(self.replacement, start, stop),
            None if self.noise is None else self.noise[:, cut],
            image if self.mask is not None else None,
            drawn if self.mask is not None else None,
            None if self.mask is None else self.mask[cut],
            self.first_row,
            None if self.measurement is None else self.measurement[cut],
        )

    def _noised(self, image: Tensor, eps: Tensor) -> Tensor:
        """x_t of the image at the first timestep (DDPM eq. 4), or eps where nothing is kept."""
        if self.first == 0 and self.mask is not None:
            return eps
        signal, sigma = self.level(self.timesteps[self.first])
        return signal * image + sigma * eps

    def _first(self, start: int | None, strength: float) -> int:
        """The number of the timestep to begin with."""
        rows = len(self.timesteps)
        strength = as_number("strength", strength, finite=False)
        if self.image is not None and self.x_T is not None and self.mask is None:
            raise ValueError("give image or x_T to start from, not both; with a mask both have use")
        if start is not None:
            start = as_integer("start", start, "an int or None")
            if self.x_T is None:
                raise ValueError("start says where x_T stands: give x_T too")
            if start > self.last:
                raise ValueError(f"start must be at most {self.last}; got {start}")
            if strength != 1:
                raise ValueError(f"give start or strength, not both; got {start} and {strength}")
            reached = [i for i, t in enumerate(self.timesteps) if t <= start]
            if not reached:
                raise ValueError(f"start must be at least {self.timesteps[-1]}; got {start}")
            return reached[0]
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1]; got {strength}")
        if strength < 1 and self.image is None:
            raise ValueError(f"strength={strength} needs an image to start from")
        return min(rows - int(rows * strength), rows - 1)

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        if self.image is None:
            raise ValueError("mask needs the image that is to be kept where mask is 0")
        check_values("mask", mask)
        check_real("mask", mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must hold 0 (keep) and 1 (generate) only")
        try:
            return mask.to(device=self.device, dtype=self.dtype).expand(self.shape)
        except RuntimeError:
            raise ValueError(
                f"mask must be broadcastable to {self.shape}; got shape {tuple(mask.shape)}"
            ) from None

    def _measured(self, y: Tensor | None, steering: Steering | None) -> Tensor | None:
        """y where the guidance asks for it, in the dtype that the table has beside this x."""
        dtype = history_dtype(self.dtype)
        shape = None
        if steering is not None:
            shape = steering.measured_shape(self.shape, dtype, self.device)
        if shape is None and y is not None:
            raise ValueError("measurement needs a guidance that it is for: PiGDM or DPS")
        if shape is not None and y is None:
            raise ValueError(
                f"the guidance of this sampler needs measurement=y, of shape {shape}; got None"
            )
        return None if shape is None else self._like_x("measurement", y, shape, dtype)

    def _like_x(
        self,
        name: str,
        value: Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
    ) -> Tensor | None:
        if value is None:
            return None
        dtype = dtype or self.dtype
        check_real(name, value)
        check_floats(name, value)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite; it holds NaN or infinity")
        cast = value.detach().to(device=self.device, dtype=dtype)
        if cast.dtype != value.dtype and not bool(torch.isfinite(cast).all()):
            largest = torch.finfo(dtype).max
            raise ValueError(
                f"{name} must be at most {largest:.3g} to be finite in {dtype}, the sampler's "
                f"dtype; it holds {float(value.abs().max()):.3g}"
            )
        return cast


def replacement(
    condition: Any, guidance: Steering | None, count: int, device: torch.device
) -> dict[str, Any] | None:
    """What makes a checked condition the unconditional one; None where no guidance asks for it."""
    if guidance is None or guidance.unconditional is None:
        return None
    return check_replacement(condition, guidance.unconditional, count, device, guidance.batched)


def check_watching(progress: bool, callback: Any) -> None:
    """TypeError unless progress is a flag and the callback, if there is one, can be called."""
    check_flag("progress", progress)
    if callback is not None:
        check_callable("callback", callback, "callable as callback(step), or None")


def check_images(name: str, x: Tensor) -> None:
    """Raise unless x holds floats, [N, C, ...]."""
    check_floats(name, x)
    if x.dim() < 2 or not x.numel():
        raise ValueError(f"{name} must have shape [N, C, ...]; got {tuple(x.shape)}")


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    checked = as_sizes("shape", shape)
    if len(checked) < 2:
        raise ValueError(f"shape must be (N, C, ...); got {checked}")
    return checked
