"""Concatenate images by their channels while they stay [N, H, W, C] in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from stepfuse.kernels.backends import implementation, why_not
from stepfuse.kernels.layout import resolved
from stepfuse.kernels.registration import define, eager


def concatenate(images: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """Put images side by side in their channels.

        y = cat(images, 1)          every pixel of the first, then the same pixel of the second

    Args:
        images: [N, C_i, H, W] of one dtype, whichever it is; others than channels-last are copied
            first.
        out: may hold y: a tensor like it that shares no memory with the images.

    Returns y [N, sum C_i, H, W], channels-last whatever the strides of the images say: those of a
    single image that came from tokens do not tell. Exact. CPU tensors only; records no gradient.

    Raises ValueError for images that differ in more than their channels.
    """
    if eager(*images) and images[0].is_cpu:
        return _run(images, out)
    y: Tensor = OP(images)
    return y


def _run(images: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    first, shape = images[0], _shape(images)
    if out is None or out.shape != shape or out.dtype != first.dtype:
        out = _empty(shape, first.dtype, first.device)
    _implementation().run(resolved(*images), out)
    return out


@functools.cache
def _implementation() -> ModuleType:
    """The C++ module copies bytes, so that any dtype will do."""
    return implementation("concatenate", "reference" if why_not("cpp") else "cpp")


def _shape(images: Sequence[Tensor]) -> tuple[int, ...]:
    """Of the images side by side, once they fit together."""
    dtype, shapes = images[0].dtype, [image.shape for image in images]
    if any(image.dim() != 4 or image.dtype != dtype for image in images):
        raise _unlike(images)
    n, _, h, w = shapes[0]
    if any(shape != (n, shape[1], h, w) for shape in shapes):
        raise _unlike(images)
    return (n, sum(shape[1] for shape in shapes), h, w)


def _unlike(images: Sequence[Tensor]) -> ValueError:
    given = ", ".join(f"{image.dtype} {list(image.shape)}" for image in images)
    return ValueError(f"images must be [N, C, H, W], alike but for their channels; got {given}")


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


OP = define(
    "concatenate(Tensor[] images) -> Tensor",
    lambda images: _run(images),
    lambda images: _empty(_shape(images), images[0].dtype, images[0].device),
    devices=("CPU",),
    direct=lambda: concatenate,
    blank=lambda result: _empty(result.shape, result.dtype, "meta"),
)
