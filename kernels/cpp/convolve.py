"""Convolutions with packed filters by the C++ module; the contract is that of the reference, with
the filters packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfuse.kernels.cpp.group_norm_silu import arguments as norm_arguments
from stepfuse.kernels.cpp.module import DTYPES, native, threads
from stepfuse.kernels.filters import FORMS, is_plain, result_shape
from stepfuse.kernels.layout import resolved

_CODES: dict[str, int] = {form: code for code, form in enumerate(FORMS)}  # Form in csrc/convolve.h


class Prepared:
    """A call with everything done that stays the same: all but x, beside, residual, scale, shift
    and add, whose shapes and dtypes stay too.
    """

    def __init__(
        self,
        x: Tensor,
        u: Tensor,
        bias: Tensor | None,
        form: str,
        stride: int,
        groups: int,
        eps: float,
        weight: Tensor | None,
        offset: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        add: Tensor | None,
        silu: bool,
        beside: Tensor | None,
    ) -> None:
        n, split, h, w = x.shape if x.dim() == 4 else (x.shape[0], x.shape[2], x.shape[1], 1)
        c = split + (0 if beside is None else beside.shape[1])
        k = u.shape[0] * u.shape[4]
        self.given, self.shape, self.dtype = (u, bias, weight, offset), x.shape, x.dtype
        plain = is_plain(u, form)
        u, bias, weight, offset = resolved(u, bias, weight, offset)
        added = None if bias is None else bias.to(torch.float32).contiguous()
        self.held = (u.contiguous(), added, _plain(weight), _plain(offset))
        self.modulation = tuple(map(_plain, (scale, shift, add)))
        self.modulated = groups > 0 and any(value is not None for value in self.modulation)
        norm: list[int] = []
        if groups:
            images = x if x.dim() == 4 else x.transpose(1, 2)
            parameters = (*self.held[2:], *self.modulation)
            norm, _ = norm_arguments(images, True, groups, silu, parameters)
            norm[4] = c  # of both images
        self.format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        self.result = result_shape(x.shape, k, form, stride)
        bias_address = 0 if added is None else added.data_ptr()
        codes, sizes = (DTYPES[x.dtype], _CODES[form], stride), (n, h, w, c, k)
        self.beside = None if beside is None else beside.shape
        addresses = (self.held[0].data_ptr(), plain, bias_address)
        self.run = native.Convolution(*addresses, *codes, sizes, split, norm, eps).run

    def lasts(self) -> bool:
        """Whether nothing was copied: a copy does not follow what is written into a constant."""
        return all(held is given for held, given in zip(self.held, self.given, strict=True))

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        modulation: Sequence[Tensor | None],
        beside: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The result, in ``out`` where that is a tensor like it."""
        x, residual, beside, *modulation = resolved(x, residual, beside, *modulation)
        image = x.contiguous(memory_format=self.format)
        images = [image.data_ptr(), 0]
        if beside is not None:
            beside = beside.contiguous(memory_format=self.format)
            images[1] = beside.data_ptr()
        if out is None or out.shape != self.result or out.dtype != self.dtype:
            out = torch.empty(self.result, dtype=self.dtype, memory_format=self.format)
        added = 0
        if residual is not None:
            if residual.shape != out.shape:
                raise ValueError(f"residual must be {list(out.shape)}; got {list(residual.shape)}")
            if residual.dtype != self.dtype:
                residual = residual.to(self.dtype)
            residual = residual.contiguous(memory_format=self.format)
            added = residual.data_ptr()
        if not self.modulated:
            self.run(*images, added, out.data_ptr(), 0, 0, 0, 0, 0, 0, threads())
            return out
        where: list[int] = []
        alive = []
        for value, first in zip(modulation, self.modulation, strict=True):
            if value is None or first is None:
                where += (0, 0)
                continue
            if value.dtype != first.dtype or value.stride(1) != 1:
                value = value.to(first.dtype).contiguous()
                alive.append(value)
            where += (value.data_ptr(), value.stride(0))
        self.run(*images, added, out.data_ptr(), *where, threads())
        return out


def _plain(value: Tensor | None) -> Tensor | None:
    """As the C++ module reads parameters: in a dtype it knows, channels side by side."""
    if value is None or (value.dtype in DTYPES and value.stride(-1) == 1):
        return value
    return value.to(torch.float32).contiguous()
