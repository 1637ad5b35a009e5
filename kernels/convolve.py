"""Convolutions and linear layers, with the norm before and the residual after them in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepfuse.kernels.backends import implementation
from stepfuse.kernels.checks import check_word
from stepfuse.kernels.filters import FORMS, PRODUCTS, is_plain, result_shape, whole_tiles
from stepfuse.kernels.products import vector_channels, whole_vectors, why_not
from stepfuse.kernels.registration import OperatorCall, define, eager

if TYPE_CHECKING:
    from stepfuse.kernels.cpp.convolve import Prepared


def convolve(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    form: str = "dense",
    stride: int = 1,
    groups: int = 0,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    silu: bool = False,
    beside: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise, convolve and add in one pass over the image.

        y = conv(act(norm(x)), w) + bias + residual

    A convolution is a sum of matrix products over channels, one for each tap of its kernel. Its
    form says which products, and how many multiplications a result takes for each pair of channels:

        dense      1x1 or a linear layer                                                   1
        direct     3x3 with padding 1 and stride 1 or 2                                    9
        lines      F(2, 3) in each of 3 rows                                               6
        squares    F(2x2, 3x3)                                                             4
        enlarged   3x3 of an image enlarged twice by nearest neighbours                    2.25

    The norm is that of `group_norm_silu`, whose result is never written to memory nor rounded: the
    statistics are taken first, and pixels are normalised as they are read. In float32 every form
    rounds like the direct sum. In bfloat16 transformed pixels are rounded, and their sums and those
    of filters weigh more than the results they cancel to: the error of a layer grows by about 1.4
    (lines) and 1.7 (squares). An infinite pixel makes its neighbours NaN.

    Args:
        x: [N, C, H, W], or tokens [N, L, C] for "dense"; float32 or bfloat16. Images are read
            channels-last, others are copied first.
        u: w as `stepfuse.kernels.filters.filters` packs it for ``form``, in the dtype of x.
        bias: [K], or None for 0.
        residual: of the shape of y, or None for 0.
        form, stride: as above; stride 2 is for "direct".
        groups: of the norm, a divisor of C; 0 is no norm, and what follows has no meaning then.
        eps, weight, offset, scale, shift, add: those of `group_norm_silu`, ``offset`` its bias.
        silu: whether the norm is activated.
        beside: an image [N, C', H, W]: the convolution is that of cat([x, beside], 1), which is
            never made, and C above is the sum of both. Each fills whole vectors of channels.
        out: may hold y: a tensor like it that shares no memory with the arguments.

    Returns y [N, K, H', W'], channels-last, or [N, L, K]. CPU tensors only; records no gradient.

    Raises ValueError for arguments that do not fit together, and where the C++ module cannot run
    them: the filters are packed for it, so that no other backend can read them.
    """
    return CallSite()(
        x, u, bias, residual, form, stride, groups, eps, weight, offset, scale, shift, add, silu,
        beside, out,
    )  # fmt: skip


@dataclass(frozen=True)
class ConvolveCall(OperatorCall):
    """The arguments of `convolve` by name, as a graph's nodes or as tensors."""

    x: Any
    u: Any
    bias: Any = None
    residual: Any = None
    form: str = "dense"
    stride: int = 1
    groups: int = 0
    eps: float = 1e-5
    weight: Any = None
    offset: Any = None
    scale: Any = None
    shift: Any = None
    add: Any = None
    silu: bool = False
    beside: Any = None


_OF_NORM, _MODULATION = ("weight", "offset"), ("scale", "shift", "add")


class CallSite:
    """`convolve` at one place of a network: what stays the same is prepared once."""

    def __init__(self) -> None:
        self.prepared: Prepared | None = None

    def __call__(
        self,
        x: Tensor,
        u: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
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
        out: Tensor | None = None,
    ) -> Tensor:
        """As `convolve`; what is no tensor must be that of the first call."""
        if not eager(x, residual, beside):
            watched: Tensor = OP(
                x, u, bias, residual, form, stride, groups, eps, weight, offset, scale, shift, add,
                silu, beside,
            )  # fmt: skip
            return watched
        prepared = self.prepared
        if prepared is not None:
            held = prepared.given
            same = held[0] is u and held[1] is bias and held[2] is weight and held[3] is offset
            same = same and prepared.shape == x.shape and prepared.dtype == x.dtype
            if same and prepared.beside == (None if beside is None else beside.shape):
                return prepared(x, residual, (scale, shift, add), beside, out)
        call = ConvolveCall(
            x, u, bias, None, form, stride, groups, eps, weight, offset, scale, shift, add, silu,
            beside,
        )  # fmt: skip
        prepared = _prepare(call)
        self.prepared = prepared if prepared.lasts() else None
        return prepared(x, residual, (scale, shift, add), beside, out)


def _run(*arguments: Any) -> Tensor:
    call = ConvolveCall.of(arguments)
    return _prepare(call)(call.x, call.residual, (call.scale, call.shift, call.add), call.beside)


def _prepare(call: ConvolveCall) -> Prepared:
    """Check what stays the same, and prepare it."""
    x, u, form, beside, groups = call.x, call.u, call.form, call.beside, call.groups
    check_word("form", form, FORMS)
    if reason := why_not(x.dtype) or ("" if x.is_cpu else f"not on {x.device}"):
        raise ValueError(f"a convolution of {x.dtype} cannot run here: {reason}")
    n, c, h, w = x.shape if x.dim() == 4 else (x.shape[0], x.shape[2], x.shape[1], 1)
    if beside is not None:
        _check_beside(x, beside)
        c += beside.shape[1]
    k = u.shape[0] * u.shape[4]
    alike = x.dtype == u.dtype and c == u.shape[3] * u.shape[5]
    if not alike or not (is_plain(u, form) or u.shape[1:3] == PRODUCTS[form]):
        raise ValueError(
            f"{x.dtype} {[n, c, h, w]} does not fit filters {list(u.shape)} of {form!r}"
        )
    if not whole_tiles(h, w, form):
        raise ValueError(f"{form!r} needs an even size; got {h}x{w}")
    for shape, names in (((k,), ("bias",)), ((c,), _OF_NORM), ((n, c), _MODULATION)):
        for name in names:
            value = getattr(call, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}")
    if groups and c % groups:
        raise ValueError(f"groups must divide the {c} channels; got {groups}")
    arguments = {field.name: getattr(call, field.name) for field in fields(call)}
    del arguments["residual"]  # of one call
    made: Prepared = implementation("convolve", "cpp").Prepared(**arguments)
    return made


def _check_beside(x: Tensor, beside: Tensor) -> None:
    """Both images have whole vectors of channels, and are alike but for these."""
    alike = x.dim() == beside.dim() == 4 and x.shape[2:] == beside.shape[2:]
    if not alike or x.shape[0] != beside.shape[0] or x.dtype != beside.dtype:
        raise ValueError(
            f"images side by side must be [N, C, H, W], alike but for C; got {x.dtype} "
            f"{list(x.shape)} and {beside.dtype} {list(beside.shape)}"
        )
    if not whole_vectors(x.shape[1], beside.shape[1]):
        raise ValueError(
            f"images side by side must have a multiple of {vector_channels()} channels; got "
            f"{x.shape[1]} and {beside.shape[1]}"
        )


def _fake(
    x: Tensor, u: Tensor, bias: Tensor | None, residual: Tensor | None, form: str, stride: int,
    *_: Any,
) -> Tensor:  # fmt: skip
    return _empty(result_shape(x.shape, u.shape[0] * u.shape[4], form, stride), x.dtype, x.device)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=order)


OP = define(
    "convolve(Tensor x, Tensor u, Tensor? bias, Tensor? residual, str form, int stride, "
    "int groups, float eps, Tensor? weight, Tensor? offset, Tensor? scale, Tensor? shift, "
    "Tensor? add, bool silu, Tensor? beside=None) -> Tensor",
    _run,
    _fake,
    devices=("CPU",),
    direct=CallSite,
    blank=lambda result: _empty(result.shape, result.dtype, "meta"),
)
