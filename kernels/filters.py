"""The filters of `convolve`: the forms there are, and weights packed for them.

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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stepfuse.kernels.products import vector_channels, whole_vectors

Form = Literal["dense", "direct", "lines", "squares", "enlarged"]
FORMS: tuple[Form, ...] = ("dense", "direct", "lines", "squares", "enlarged")
PRODUCTS: dict[str, tuple[int, int]] = {  # frequencies, and terms each of them sums
    "dense": (1, 1),
    "direct": (1, 9),
    "lines": (4, 3),
    "squares": (16, 1),
    "enlarged": (9, 1),
}
_LINES = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64) / 2
_ENLARGED = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.float64)
_CHANNELS = 128  # whose filters are transformed at a time
_EVEN = ("lines", "squares")  # need an even width; squares an even height too


def fits(shape: Sequence[int], channels_out: int, form: Form) -> bool:
    """Whether images [N, C, H, W] divide into tiles, and channels into vectors."""
    return whole_vectors(shape[1], channels_out) and whole_tiles(shape[2], shape[3], form)


def whole_tiles(height: int, width: int, form: str) -> bool:
    """Whether an image of this size divides into the tiles of a form."""
    return not (form in _EVEN and width % 2) and not (form == "squares" and height % 2)


def filters(weight: Tensor, form: Form, dtype: torch.dtype, plain: bool = False) -> Tensor:
    """The left and right G of w [K, C, 3, 3] (or [K, C, 1, 1], [K, C]), computed in float64 and
    rounded once, as the operator takes it: [K / vector, frequencies, taps, C, vector], in bfloat16
    with pairs of C side by side. With ``plain`` w itself, as it is for "direct"; float32 only.

    Raises ValueError where there is no C++ module, whose vectors these are.
    """
    kept = _kept(form, dtype, plain)
    made = torch.empty(filters_shape(weight.shape, form, dtype, plain), dtype=dtype)
    wide, together = made.shape[4:]
    for block in range(len(made)):  # float64 of all of them would be a peak of memory
        row = weight[block * wide : (block + 1) * wide]
        for c in range(0, weight.shape[1], _CHANNELS):
            part = _filters(row[:, c : c + _CHANNELS], kept, dtype)
            made[block, :, :, c // together : c // together + part.shape[2]] = part
    return made


def filters_shape(
    shape: Sequence[int], form: Form, dtype: torch.dtype, plain: bool = False
) -> tuple[int, ...]:
    """The shape of `filters` of a weight of this ``shape``."""
    if not vector_channels():
        raise ValueError("filters cannot be packed here: no C++ module")
    together = _together(dtype)
    blocks, channels = shape[0] // vector_channels(), shape[1] // together
    return (blocks, *PRODUCTS[_kept(form, dtype, plain)], channels, vector_channels(), together)


def is_plain(u: Tensor, form: str) -> bool:
    """Whether the packed filters u hold w itself though the form transforms it."""
    transforms = form not in ("dense", "direct") and u.dtype is torch.float32
    return transforms and u.shape[1:3] == PRODUCTS["direct"]


def _kept(form: Form, dtype: torch.dtype, plain: bool) -> Form:
    """The form whose filters are in memory."""
    return "direct" if plain and dtype is torch.float32 and form != "dense" else form


def _together(dtype: torch.dtype) -> int:
    """Channels of the image side by side."""
    return 2 if dtype is torch.bfloat16 else 1


def _filters(weight: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """Of one block of results and some channels."""
    k, c = weight.shape[:2]
    together = _together(dtype)
    if form in ("dense", "direct"):
        turned = weight.mT if weight.dim() == 4 else weight
        u = turned.reshape(k, c, 1, -1).permute(2, 3, 0, 1)
    elif form == "lines":
        u = torch.einsum("fj,kcij->fikc", _LINES, weight.double())
    else:
        g = _LINES if form == "squares" else _ENLARGED
        u = torch.einsum("ai,bj,kcij->bakc", g, g, weight.double()).reshape(len(g) ** 2, 1, k, c)
    frequencies, taps = PRODUCTS[form]
    u = u.to(dtype).reshape(frequencies, taps, k, c // together, together)
    return u.permute(0, 1, 3, 2, 4)


def result_shape(
    shape: Sequence[int], channels_out: int, form: str, stride: int
) -> tuple[int, ...]:
    """The shape of what becomes of images [N, C, H, W] or tokens [N, L, C] of this ``shape``."""
    if len(shape) == 3:
        return (*shape[:2], channels_out)
    n, _, h, w = shape
    if form == "enlarged":
        return (n, channels_out, 2 * h, 2 * w)
    return (n, channels_out, (h - 1) // stride + 1, (w - 1) // stride + 1)
