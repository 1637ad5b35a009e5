"""GroupNorm, AdaGN modulation and SiLU in one pass over the activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepfuse.kernels.backends import function
from stepfuse.kernels.checks import (
    as_integer,
    as_number,
    check_float,
    check_like,
    check_out,
    check_word,
)
from stepfuse.kernels.layout import as_images, buffer_for, cast, laid_out, layout_of, resolved
from stepfuse.kernels.overlap import check_memory
from stepfuse.kernels.reference.group_norm_silu import formula
from stepfuse.kernels.registration import (
    OperatorCall,
    define,
    eager,
    raise_versions,
    records_gradient,
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    act: Literal["silu", "none"] = "silu",
    backend: str = "auto",
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise groups of channels, modulate, activate.

        h = x + add
        h = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias      mean, var over a group
        y = act((1 + scale) h + shift)

    GroupNorm is Wu & He 2018, section 3; the modulation is AdaGN, Dhariwal & Nichol 2021,
    section 3.1; ``add`` is the time-embedding bias of DDPM's residual block (appendix B).

    Args:
        x: [N, C, ...] with any number of spatial dimensions, float32, bfloat16, float16 or float64;
            channels-first or channels-last in memory, and y is laid out alike.
        weight, bias: [C], or None for 1 and 0.
        groups: a divisor of C.
        eps: added to the variance: at least the smallest normal number of the arithmetic, 1.2e-38
            in float32.
        scale, shift, add: [N, C], or None for 0.
        act: "silu" (y = h sigmoid(h)) or "none".
        backend: "auto", "reference", "cpp" or "triton".
        out: where to write y, of the shape and dtype of x, and possibly x itself; it must not
            overlap itself or an input otherwise.

    Returns y, of the shape and dtype of x. Statistics and arithmetic are float32 (float64 for
    float64 input). Differentiable in every tensor, twice too (the second time by the reference's
    formula), unless it writes into ``out``.

    Raises ValueError or TypeError for arguments that do not fit together, `BackendUnavailable`
    where ``backend`` cannot run them.
    """
    groups, eps = _check(x, weight, bias, groups, eps, scale, shift, add, act)
    tensors = (x, weight, bias, scale, shift, add)
    args = (x, weight, bias, groups, eps, scale, shift, add, act == "silu", backend)
    if out is None:
        call = _functional if eager(*tensors) else OP
        y: Tensor = call(*args)
        return y
    if records_gradient(tensors):
        raise ValueError("out= records no gradient; call under torch.no_grad()")
    check_out("out", out, x)
    if eager(*tensors, out):
        _write_out(*args, out=out)
    elif out is x:
        _OP_INPLACE(*args)
    else:
        _OP_OUT(*args, out=out)
    return out


@dataclass(frozen=True)
class GroupNormCall(OperatorCall):
    """The arguments of the operator by name, as a graph's nodes or as tensors."""

    x: Any
    weight: Any
    bias: Any
    groups: int
    eps: float = 1e-5
    scale: Any = None
    shift: Any = None
    add: Any = None
    silu: bool = True
    backend: str = "auto"


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    act: str,
) -> tuple[int, float]:
    """Raise unless the arguments fit together; groups and eps as an int and a float."""
    check_float("x", x)
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"x must have shape [N, C, ...]; got {tuple(shape)}")
    count, channels = shape[0], shape[1]
    groups, eps = as_integer("groups", groups), as_number("eps", eps)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels; got {groups}")
    least = least_eps(x.dtype)
    if eps < least:
        raise ValueError(f"eps must be at least {least:.3g} in {x.dtype}, and positive; got {eps}")
    check_word("act", act, ("silu", "none"))
    if weight is not None:
        check_like("weight", weight, (channels,), x)
    if bias is not None:
        check_like("bias", bias, (channels,), x)
    if scale is not None:
        check_like("scale", scale, (count, channels), x)
    if shift is not None:
        check_like("shift", shift, (count, channels), x)
    if add is not None:
        check_like("add", add, (count, channels), x)
    return groups, eps


def least_eps(dtype: torch.dtype) -> float:
    """The smallest eps for x of this dtype.

    A smaller one is 0 in the arithmetic, where subnormal numbers may be flushed, and a constant
    group divides by it.
    """
    return _LEAST[dtype is torch.float64]


_LEAST = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float64).tiny)


def _write(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    backend: str,
) -> None:
    """Run a backend, on tensors of one layout."""
    if x.numel() == 0:
        return
    x, weight, bias, scale, shift, add = resolved(x, weight, bias, scale, shift, add)
    x, y = as_images(x, out)
    layout = layout_of(x)
    target = buffer_for(y, layout)
    function("group_norm_silu", "run", backend, x)(
        laid_out(x, layout),
        _parameter(weight, x),
        _parameter(bias, x),
        groups,
        eps,
        _parameter(scale, x),
        _parameter(shift, x),
        _parameter(add, x),
        silu,
        target,
    )
    if target is not y:
        y.copy_(target)


def _parameter(v: Tensor | None, x: Tensor) -> Tensor | None:
    """[C] or [N, C] with neighbouring channels side by side; halves of a projection are that."""
    if v is None:
        return None
    if v.dtype is torch.float64:
        v = cast(v, x.dtype)
    return v if v.stride(-1) == 1 else v.contiguous()


def _functional(x: Tensor, *args: Any) -> Tensor:
    out = torch.empty_like(x)
    _write(out, x, *args)
    return out


def _direct(*args: Any) -> Tensor:
    """The operator, which skips the dispatcher where nobody watches it."""
    *shared, silu, backend = args
    call: Callable[..., Tensor] = group_norm_silu
    return call(*shared, "silu" if silu else "none", backend)


def _write_out(*args: Any, out: Tensor) -> None:
    x, weight, bias, _, _, *modulation, _, _ = args
    check_memory({"out": out}, {"x": x}, (weight, bias, *modulation))
    _write(out, *args)
    raise_versions((out,))


def _write_over(x: Tensor, *args: Any) -> None:
    _write_out(x, *args, out=x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, groups, eps, scale, shift, add, silu, backend = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, add)
    ctx.constants = groups, eps, silu, backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, scale, shift, add = ctx.saved_tensors
    groups, eps, silu, backend = ctx.constants
    need = ctx.needs_input_grad
    wanted = [need[i] for i in _TENSORS]
    args = (x, weight, bias, groups, eps, scale, shift, add, silu, backend)
    return _spread(_OP_BACKWARD(grad, *args, wanted), wanted)


_TENSORS = (0, 1, 2, 5, 6, 7)  # where the tensors stand among the ten arguments


def _spread(grads: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Any, ...]:
    """The gradients of the tensors, with None for the other arguments and for the unwanted."""
    result: list[Tensor | None] = [None] * 10
    for i, grad, want in zip(_TENSORS, grads, wanted, strict=True):
        result[i] = grad if want else None
    return tuple(result)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x, weight, bias, scale, shift and add; [0] for those not wanted."""
    results = _fake_backward(
        grad, x, weight, bias, groups, eps, scale, shift, add, silu, backend, wanted
    )
    if x.numel() == 0:
        return tuple(result.zero_() for result in results)
    grad, x, weight, bias, scale, shift, add = resolved(grad, x, weight, bias, scale, shift, add)
    dx = results[0] if wanted[0] else torch.empty_like(x)
    if grad.stride() != dx.stride() or grad.dtype != dx.dtype:
        grad = dx.copy_(grad).clone() if wanted[0] else dx.copy_(grad)
    image, grad, dx = as_images(x, grad, dx)
    layout = layout_of(image)
    float32 = torch.float64 if x.dtype == torch.float64 else torch.float32
    targets: list[Tensor | None] = [buffer_for(dx, layout) if wanted[0] else None]
    for result, want in zip(results[1:], wanted[1:], strict=True):
        targets.append(result.to(float32) if want else None)
    function("group_norm_silu", "backward", backend, x)(
        laid_out(grad, layout),
        laid_out(image, layout),
        _parameter(weight, x),
        _parameter(bias, x),
        groups,
        eps,
        _parameter(scale, x),
        _parameter(shift, x),
        _parameter(add, x),
        silu,
        *targets,
    )
    for result, target in zip((dx, *results[1:]), targets, strict=True):
        if target is not None and target is not result:
            result.copy_(target)
    return results


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    tensors = (x, weight, bias, scale, shift, add)
    return tuple(
        x.new_empty(0) if tensor is None or not want else torch.empty_like(tensor)
        for tensor, want in zip(tensors, wanted, strict=True)
    )


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, x, weight, bias, groups, eps, scale, shift, add, silu, _, wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, x, weight, bias, scale, shift, add)
    ctx.constants = groups, eps, silu, list(wanted)


def _double_backward(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
    """Differentiate the reference twice: second derivatives are rare, and not worth a kernel."""
    groups, eps, silu, wanted = ctx.constants
    with torch.enable_grad():
        leaves = [None if v is None else v.detach().requires_grad_() for v in ctx.saved_tensors]
        grad, x = leaves[:2]
        assert grad is not None
        assert x is not None
        weight, bias, scale, shift, add = leaves[2:]
        y = formula(x, weight, bias, groups, eps, scale, shift, add, silu).to(grad.dtype)
        inputs = [v for v, want in zip(leaves[1:], wanted, strict=True) if want and v is not None]
        given = [d for d, want in zip(seconds, wanted, strict=True) if want]
        firsts = torch.autograd.grad(y, inputs, grad, create_graph=True)
        pairs = [(first, d) for first, d in zip(firsts, given, strict=True) if d is not None]
        present = [v for v in leaves if v is not None]
        found = torch.autograd.grad(
            [first for first, _ in pairs], present, [d for _, d in pairs], allow_unused=True
        )
    grads = iter(found)
    results = [None if v is None else next(grads) for v in leaves]
    need = [True] * 6
    return (results[0], *_spread(results[1:], need), None)


_INPUTS = (
    "Tensor? weight, Tensor? bias, int groups, float eps, "
    "Tensor? scale, Tensor? shift, Tensor? add, bool silu, str backend"
)

OP = define(
    f"group_norm_silu(Tensor x, {_INPUTS}) -> Tensor",
    _functional,
    lambda x, *args: torch.empty_like(x),
    setup=_setup,
    backward=_backward,
    direct=lambda: _direct,
)
_OP_OUT = define(
    f"group_norm_silu_out(Tensor x, {_INPUTS}, *, Tensor(a!) out) -> ()",
    _write_out,
    lambda *args, **kwargs: None,
)
_OP_INPLACE = define(
    f"group_norm_silu_(Tensor(a!) x, {_INPUTS}) -> ()", _write_over, lambda *args: None
)
_OP_BACKWARD = define(
    f"group_norm_silu_backward(Tensor grad, Tensor x, {_INPUTS}, bool[6] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    setup=_setup_backward,
    backward=_double_backward,
)
