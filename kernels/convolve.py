"""Convolutions and linear layers with packed filters: an operator of the C++ module.

    y = conv(act(norm(x)), w) + b + residual

A convolution is a sum of matrix products over channels, one for each tap of its kernel. Its form
says which products, and how many multiplications a result takes for each pair of channels:

    dense      1x1 or a linear layer                                                   1
    direct     3x3 with padding 1 and stride 1 or 2                                    9
    lines      F(2, 3) in each of 3 rows                                               6
    squares    F(2x2, 3x3)                                                             4
    enlarged   3x3 of an image enlarged twice by nearest neighbours                    2.25

Lines and squares are Winograd's minimal filtering (Lavin and Gray 2016, sections 4.1 and 4.2). With
"*" a matrix product over channels at each frequency, and d the pixels of an axis that a pair of
results y depends on,

    y = A^T [ (G w G^T) * (B^T d B) ] A        in both axes
    y = A^T [ (G w) * (B^T d) ]                along rows, summed over three of them

    B^T = 1  0 -1  0     G =  1    0    0      A^T = 1  1  1  0
          0  1  1  0         1/2  1/2  1/2           0  1 -1 -1
          0 -1  1  0         1/2 -1/2  1/2
          0  1  0 -1          0    0    1

In an enlarged image a pixel d1 stands for two, which depend on its neighbours d0 and d2 too. For
one axis and w = (a, b, c) the pair of results is

    a d0 + (b + c) d1 = a (d0 - d1) + (a + b + c) d1
    (a + b) d1 + c d2 =               (a + b + c) d1 + c (d2 - d1)

three products, in both axes nine for four results:

    B^T = 1 -1  0        G = 1  0  0           A^T = 1  1  0
          0  1  0            1  1  1                 0  1  1
          0 -1  1            0  0  1

G w is computed in float64, rounded once, and kept; of lines and squares it is 4/3 and 16/9 as large
as w. In float32 w can be kept instead ("plain" filters): the operator then applies G itself, a
block at a time, which takes a tenth to a quarter longer.

The norm is that of `group_norm_silu`, whose result is never written to memory nor rounded: the
statistics are taken first, and pixels are normalised as they are read. In float32 every form rounds
like the direct sum. In bfloat16 transformed pixels are rounded, and their sums and those of filters
weigh more than the results they cancel to: the error of a layer grows by about 1.4 (lines) and 1.7
(squares). An infinite pixel makes its neighbours NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from stepfuse.kernels.layout import resolved
from stepfuse.kernels.registration import define, eager

native: Any
try:
    from stepfuse.kernels.cpp.group_norm_silu import arguments as norm_arguments
    from stepfuse.kernels.cpp.module import DTYPES, native, threads
except ImportError:  # installed without a C++ compiler
    native = None

Form = Literal["dense", "direct", "lines", "squares", "enlarged"]
FORMS: tuple[Form, ...] = ("dense", "direct", "lines", "squares", "enlarged")
_LINES = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64) / 2
_ENLARGED = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.float64)
_PRODUCTS: dict[str, tuple[int, int]] = {  # frequencies, and terms each of them sums
    "dense": (1, 1),
    "direct": (1, 9),
    "lines": (4, 3),
    "squares": (16, 1),
    "enlarged": (9, 1),
}
_CHANNELS = 128  # whose filters are transformed at a time
_EVEN = ("lines", "squares")  # need an even width; squares an even height too


def why_not(dtype: torch.dtype) -> str:
    """Why the operator cannot run here in this dtype; empty where it can."""
    if native is None:
        return "no C++ module"
    if dtype is torch.bfloat16 and not native.bfloat16_products:
        return "no dot products of bfloat16"
    return "" if dtype in (torch.float32, torch.bfloat16) else f"not for {dtype}"


def fits(shape: torch.Size, channels_out: int, form: Form) -> bool:
    """Whether images [N, C, H, W] divide into tiles, and channels into vectors."""
    channels = shape[1]
    if native is None or channels % native.wide or channels_out % native.wide:
        return False
    odd = [size % 2 for size in shape[2:]]
    return not (form in _EVEN and odd[1]) and not (form == "squares" and odd[0])


def filters(weight: Tensor, form: Form, dtype: torch.dtype, plain: bool = False) -> Tensor:
    """The left and right G of w [K, C, 3, 3] (or [K, C, 1, 1], [K, C]), computed in float64 and
    rounded once, as the operator takes it: [K / wide, frequencies, taps, C, wide], in bfloat16 with
    pairs of C side by side. With ``plain`` w itself, as it is for "direct"; float32 only.
    """
    kept = _kept(form, dtype, plain)
    made = torch.empty(filters_shape(weight.shape, form, dtype, plain), dtype=dtype)
    together = made.shape[5]
    for block in range(len(made)):  # float64 of all of them would be a peak of memory
        row = weight[block * native.wide : (block + 1) * native.wide]
        for c in range(0, weight.shape[1], _CHANNELS):
            part = _filters(row[:, c : c + _CHANNELS], kept, dtype)
            made[block, :, :, c // together : c // together + part.shape[2]] = part
    return made


def filters_shape(
    shape: Sequence[int], form: Form, dtype: torch.dtype, plain: bool = False
) -> tuple[int, ...]:
    """The shape of `filters` of a weight of this ``shape``."""
    return _shape(shape, _kept(form, dtype, plain), dtype)


def _kept(form: Form, dtype: torch.dtype, plain: bool) -> Form:
    """The form whose filters are in memory."""
    return "direct" if plain and dtype is torch.float32 and form != "dense" else form


def _filters(weight: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """Of one block of results and some channels."""
    k, c = weight.shape[:2]
    together = 2 if dtype is torch.bfloat16 else 1
    if form in ("dense", "direct"):
        turned = weight.mT if weight.dim() == 4 else weight
        u = turned.reshape(k, c, 1, -1).permute(2, 3, 0, 1)
    elif form == "lines":
        u = torch.einsum("fj,kcij->fikc", _LINES, weight.double())
    else:
        g = _LINES if form == "squares" else _ENLARGED
        u = torch.einsum("ai,bj,kcij->bakc", g, g, weight.double()).reshape(len(g) ** 2, 1, k, c)
    frequencies, taps = _PRODUCTS[form]
    u = u.to(dtype).reshape(frequencies, taps, k, c // together, together)
    return u.permute(0, 1, 3, 2, 4)


def _shape(shape: Sequence[int], form: Form, dtype: torch.dtype) -> tuple[int, ...]:
    together = 2 if dtype is torch.bfloat16 else 1
    blocks, channels = shape[0] // native.wide, shape[1] // together
    return (blocks, *_PRODUCTS[form], channels, native.wide, together)


class _Prepared:
    """The operator with everything checked that stays the same: all but x, beside, residual, scale,
    shift and add, whose shapes and dtypes stay too.
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
        beside: Tensor | None = None,
    ) -> None:
        modulation = (scale, shift, add)
        if reason := why_not(x.dtype):
            raise ValueError(f"a convolution of {x.dtype} cannot run here: {reason}")
        n, c, h, w = x.shape if x.dim() == 4 else (x.shape[0], x.shape[2], x.shape[1], 1)
        split = c
        if beside is not None:
            _check_beside(x, beside)
            c += beside.shape[1]
        k = u.shape[0] * u.shape[4]
        alike = x.dtype == u.dtype and c == u.shape[3] * u.shape[5]
        plain = form != "dense" and x.dtype is torch.float32 and u.shape[1:3] == _PRODUCTS["direct"]
        if not alike or not (plain or u.shape[1:3] == _PRODUCTS[form]):
            raise ValueError(
                f"{x.dtype} {[n, c, h, w]} does not fit filters {list(u.shape)} of {form!r}"
            )
        if (form in _EVEN and w % 2) or (form == "squares" and h % 2):
            raise ValueError(f"{form!r} needs an even size; got {h}x{w}")
        for name, value, shape in (
            ("bias", bias, (k,)),
            ("weight", weight, (c,)),
            ("offset", offset, (c,)),
            *zip(("scale", "shift", "add"), modulation, [(n, c)] * 3, strict=True),
        ):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}")
        if groups and c % groups:
            raise ValueError(f"groups must divide the {c} channels; got {groups}")
        self.given, self.shape, self.dtype = (u, bias, weight, offset), x.shape, x.dtype
        u, bias, weight, offset = resolved(u, bias, weight, offset)
        added = None if bias is None else bias.to(torch.float32).contiguous()
        self.held = (u.contiguous(), added, _plain(weight), _plain(offset))
        self.modulation = tuple(map(_plain, modulation))
        self.modulated = groups > 0 and any(value is not None for value in modulation)
        norm: list[int] = []
        if groups:
            images = x if x.dim() == 4 else x.transpose(1, 2)
            parameters = (*self.held[2:], *self.modulation)
            norm, _ = norm_arguments(images, True, groups, silu, parameters)
            norm[4] = c  # of both images
        self.format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        self.result = _result_shape(x.shape, k, form, stride)
        bias_address = 0 if added is None else added.data_ptr()
        codes, sizes = (DTYPES[x.dtype], _CODES[form], stride), (n, h, w, c, k)
        self.beside = None if beside is None else beside.shape
        addresses = (self.held[0].data_ptr(), plain and form != "direct", bias_address)
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


def _check_beside(x: Tensor, beside: Tensor) -> None:
    """Both images have whole vectors of channels, and are alike but for these."""
    alike = x.dim() == beside.dim() == 4 and x.shape[2:] == beside.shape[2:]
    if not alike or x.shape[0] != beside.shape[0] or x.dtype != beside.dtype:
        raise ValueError(
            f"images side by side must be [N, C, H, W], alike but for C; got {x.dtype} "
            f"{list(x.shape)} and {beside.dtype} {list(beside.shape)}"
        )
    if x.shape[1] % native.wide or beside.shape[1] % native.wide:
        raise ValueError(
            f"images side by side must have a multiple of {native.wide} channels; got "
            f"{x.shape[1]} and {beside.shape[1]}"
        )


def _plain(value: Tensor | None) -> Tensor | None:
    """As the C++ module reads parameters: in a dtype it knows, channels side by side."""
    if value is None or (value.dtype in DTYPES and value.stride(-1) == 1):
        return value
    return value.to(torch.float32).contiguous()


def _run(x: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any) -> Tensor:
    return _Prepared(x, u, bias, *rest)(x, residual, rest[_MODULATION], *rest[_BESIDE])


_CODES: dict[str, int] = {form: code for code, form in enumerate(FORMS)}  # Form in csrc/convolve.h


def _result_shape(
    shape: Sequence[int], channels_out: int, form: str, stride: int
) -> tuple[int, ...]:
    if len(shape) == 3:
        return (*shape[:2], channels_out)
    n, _, h, w = shape
    if form == "enlarged":
        return (n, channels_out, 2 * h, 2 * w)
    return (n, channels_out, (h - 1) // stride + 1, (w - 1) // stride + 1)


def _fake(
    x: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None, form: str, stride: int,
    *_: Any,
) -> Tensor:  # fmt: skip
    made = x.new_empty(_result_shape(x.shape, u.shape[0] * u.shape[4], form, stride))
    return made.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else made


# conv(act(norm(x)), w) + bias + residual for x [N, C, H, W], or linear for x [N, L, C] (dense), of
# float32 or bfloat16; images are channels-last. groups = 0 is no norm; its parameters are those of
# group_norm_silu, `offset` being the norm's bias. With `beside` the image is cat([x, beside], 1),
# which is never made; both have a multiple of `native.wide` channels.
convolve = define(
    "convolve(Tensor x, Tensor u, Tensor? bias, Tensor? residual, str form, int stride, "
    "int groups, float eps, Tensor? weight, Tensor? offset, Tensor? scale, Tensor? shift, "
    "Tensor? add, bool silu, Tensor? beside=None) -> Tensor",
    _run,
    _fake,
)
# of what follows the residual
_PARAMETERS, _MODULATION, _BESIDE = slice(4, 9), slice(6, 9), slice(10, 11)
NO_NORM = (0, 0.0, None, None, None, None, None, False)


def convolve_eagerly(x: Tensor, u: Tensor, *rest: Any) -> Tensor:
    """`convolve`, which skips the dispatcher where nobody watches it."""
    call = _run if eager(x, rest[1], *rest[12:]) else convolve
    y: Tensor = call(x, u, *rest)
    return y


class CallSite:
    """`convolve_eagerly` at one place of a network: what stays the same is prepared once."""

    def __init__(self) -> None:
        self.prepared: _Prepared | None = None

    def __call__(
        self,
        x: Tensor,
        u: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        *rest: Any,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `convolve`; what is no tensor must be that of the first call.

        ``out`` may hold the result: a tensor like it that shares no memory with the arguments.
        """
        beside = rest[10] if len(rest) > 10 else None
        if not eager(x, residual, beside):
            watched: Tensor = convolve(x, u, bias, residual, *rest)
            return watched
        weight, offset, *modulation = rest[_PARAMETERS]
        prepared = self.prepared
        if prepared is not None:
            held = prepared.given
            same = held[0] is u and held[1] is bias and held[2] is weight and held[3] is offset
            same = same and prepared.shape == x.shape and prepared.dtype == x.dtype
            if same and prepared.beside == (None if beside is None else beside.shape):
                return prepared(x, residual, modulation, beside, out)
        prepared = _Prepared(x, u, bias, *rest)
        self.prepared = prepared if prepared.lasts() else None
        return prepared(x, residual, modulation, beside, out)
