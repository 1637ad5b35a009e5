"""The forward process: data to data-with-noise at any timestep, in one pass."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from stepfuse.kernels.backends import function
from stepfuse.kernels.checks import (
    INDICES,
    as_integer,
    check_flag,
    check_float,
    check_like,
    check_out,
    check_range,
    check_word,
    per_sample,
    sample_indices,
)
from stepfuse.kernels.layout import buffer_for, cast, laid_out, layout_of, resolved
from stepfuse.kernels.overlap import check_memory
from stepfuse.kernels.reference.add_noise import coefficients
from stepfuse.kernels.registration import define, eager, raise_versions, records_gradient

Target = Literal["epsilon", "v_prediction"]


def add_noise(
    x0: Tensor,
    noise: Tensor | None,
    t: int | Tensor,
    alphas_cumprod: Tensor,
    *,
    target: Target | None = None,
    seed: int | Tensor | None = None,
    sample: int | Tensor = 0,
    inplace: bool = False,
    out: Tensor | None = None,
    target_out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Noise x0 to timestep t, and give the training target beside it.

        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps          DDPM (Ho et al. 2020), eq. 4
        v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x0          Salimans & Ho 2022, section 4

    Args:
        x0: [N, ...], float32, bfloat16, float16 or float64.
        noise: eps, of the shape of x0; None draws it inside (see ``seed``).
        t: index on the training schedule, one int or int64 [N].
        alphas_cumprod: [T]; float64 on x0's device costs no conversion.
        target: None, "epsilon" (the noise that was added) or "v_prediction".
        seed, sample: with ``noise=None``, the Philox seed (int or int64 [N]) and the number of the
            first sample (or int64 [N]); the timestep is part of the counter.
        inplace: write x_t over x0.
        out, target_out: where to write x_t and the target, of the shape and dtype of x0; ``out``
            may be x0. Nothing is allocated where they are laid out like x0. They must not overlap
            each other, themselves or an input, unless they are x0 or noise exactly.
        backend: "auto", "reference", "cpp" or "triton".

    Returns x_t, or (x_t, target). Differentiable in x0 and noise, twice too, unless it writes into
    ``out`` or in place. Raises ValueError or TypeError for arguments that do not fit together,
    IndexError for a t outside 0 .. T-1, `BackendUnavailable` where ``backend`` cannot run. A t on
    another device than the CPU is not read on the host: x_t, v and the gradients of such a sample
    are NaN.
    """
    check_float("x0", x0)
    if x0.dim() < 1 or x0.numel() == 0:
        raise ValueError(f"x0 must hold at least one sample; got shape {tuple(x0.shape)}")
    if target is not None:
        check_word("target", target, ("epsilon", "v_prediction"), "None")
    check_flag("inplace", inplace)
    if (noise is None) == (seed is None):
        raise ValueError("give either noise or seed: noise=None draws it and needs a seed")
    check_float("alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.is_meta and not x0.is_meta:
        raise ValueError("alphas_cumprod must hold numbers; got a tensor on meta")
    if alphas_cumprod.dim() != 1 or not alphas_cumprod.numel():
        shape = tuple(alphas_cumprod.shape)
        raise ValueError(f"alphas_cumprod must be [T] and hold something; got shape {shape}")
    device, count = x0.device, x0.shape[0]
    if not isinstance(t, Tensor):
        t = as_integer("t", t, INDICES)
        if not 0 <= t < len(alphas_cumprod):
            raise IndexError(f"t must be in 0 .. {len(alphas_cumprod) - 1}; got {t}")
    t = per_sample("t", t, count, device)
    seeds = samples = None
    if noise is not None:
        check_like("noise", noise, x0.shape, x0)
    elif seed is not None:
        seeds = per_sample("seed", seed, count, device)
        samples = sample_indices(sample, count, device)
    abar = alphas_cumprod
    if abar.dtype is not torch.float64 or abar.device != device:
        abar = abar.to(device=device, dtype=torch.float64)
    if inplace:
        if out is not None:
            raise ValueError("give inplace=True or out, not both")
        out = x0
    if target_out is not None and target is None:
        raise ValueError("target_out needs a target; got target=None")

    inputs = (x0, noise, t, abar, seeds, samples)

    direct = eager(*inputs, out, target_out)
    if out is None and target_out is None and not direct:
        x_t, goal = _OP(*inputs, target, backend)
        return x_t if target is None else (x_t, goal)
    written = [tensor for tensor in (out, target_out) if tensor is not None]
    if written and records_gradient((x0, noise)):
        raise ValueError("out= and inplace=True record no gradient; call under torch.no_grad()")
    if out is None:
        out = torch.empty_like(x0)
    elif out is not x0:
        check_out("out", out, x0)
    if target_out is not None:
        check_out("target_out", target_out, x0)
    elif target is not None:
        target_out = torch.empty_like(x0)
    velocity = target == "v_prediction"
    if direct and written:
        _write_out(*inputs, velocity, backend, out=out, target_out=target_out)
    elif direct:
        _write(out, target_out, *inputs, velocity, backend)
    elif out is x0:
        _OP_INPLACE(*inputs, velocity, backend, target_out)
    else:
        _OP_OUT(*inputs, velocity, backend, out=out, target_out=target_out)
    return out if target_out is None else (out, target_out)


def _write(
    out: Tensor,
    target_out: Tensor | None,
    x0: Tensor,
    noise: Tensor | None,
    t: Tensor,
    abar: Tensor,
    seed: Tensor | None,
    sample: Tensor | None,
    velocity: bool,
    backend: str,
) -> None:
    """Run a backend, on tensors of one layout and one dtype."""
    x0, noise, t, abar, seed, sample = resolved(x0, noise, t, abar, seed, sample)
    check_range("t", t, len(abar) - 1, IndexError)
    layout = layout_of(x0)
    if noise is not None:
        noise = laid_out(cast(noise, x0.dtype), layout)
    x_t = buffer_for(out, layout)
    goal = None if target_out is None else buffer_for(target_out, layout)
    function("add_noise", "run", backend, x0)(
        laid_out(x0, layout),
        noise,
        t,
        abar.contiguous(),
        seed,
        sample,
        x_t,
        goal,
        velocity,
    )
    if x_t is not out:
        out.copy_(x_t)
    if target_out is not None and goal is not None and goal is not target_out:
        target_out.copy_(goal)


def _write_out(*args: Any, out: Tensor, target_out: Tensor | None) -> None:
    x0, noise, *others, _, _ = args
    check_memory({"out": out, "target_out": target_out}, {"x0": x0, "noise": noise}, others)
    _write(out, target_out, *args)
    raise_versions([out] if target_out is None else [out, target_out])


def _write_over(x0: Tensor, *args: Any) -> None:
    *rest, target_out = args
    _write_out(x0, *rest, out=x0, target_out=target_out)


def _functional(x0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, target, backend = args
    inputs += [target == "v_prediction", backend]
    out, goal = _fake(x0, *args)
    _write(out, None if target is None else goal, x0, *inputs)
    return out, goal


def _fake(x0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The results, unfilled; an operator has a fixed number of them, so that no target is [0]."""
    target = args[-2]
    return torch.empty_like(x0), x0.new_empty(0) if target is None else torch.empty_like(x0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x0, noise, t, abar, _, _, target, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(t, abar)
    ctx.target = target
    ctx.x0_dtype = x0.dtype
    ctx.noise_dtype = None if noise is None else noise.dtype


def _backward(ctx: Any, d_out: Tensor | None, d_target: Tensor | None) -> tuple[Any, ...]:
    """x_t and the target are linear in x0 and eps: the gradient is the transposed 2x2 matrix."""
    t, abar = ctx.saved_tensors
    some = d_out if d_out is not None else d_target
    if some is None:
        return (None,) * 8
    dtype = torch.float64 if ctx.x0_dtype == torch.float64 else torch.float32
    signal, sigma = coefficients(t, abar, some.dim(), dtype)
    d_x0 = d_noise = torch.zeros((), dtype=dtype, device=some.device)
    if d_out is not None:
        d_x0, d_noise = d_x0 + signal * d_out, d_noise + sigma * d_out
    if d_target is not None and ctx.target == "v_prediction":
        d_x0, d_noise = d_x0 - sigma * d_target, d_noise + signal * d_target
    elif d_target is not None and ctx.target == "epsilon":
        d_x0, d_noise = d_x0.expand(d_target.shape), d_noise + d_target
    return (
        d_x0.to(ctx.x0_dtype) if ctx.needs_input_grad[0] else None,
        d_noise.to(ctx.noise_dtype) if ctx.needs_input_grad[1] else None,
        *(None,) * 6,
    )


_INPUTS = "Tensor? noise, Tensor t, Tensor alphas_cumprod, Tensor? seed, Tensor? sample"

_OP = define(
    f"add_noise(Tensor x0, {_INPUTS}, str? target, str backend) -> (Tensor, Tensor)",
    _functional,
    _fake,
    setup=_setup,
    backward=_backward,
)
_OP_OUT = define(
    f"add_noise_out(Tensor x0, {_INPUTS}, bool velocity, str backend, *, "
    "Tensor(a!) out, Tensor(b!)? target_out) -> ()",
    _write_out,
    lambda *args, **kwargs: None,
)
_OP_INPLACE = define(
    f"add_noise_(Tensor(a!) x0, {_INPUTS}, bool velocity, str backend, "
    "Tensor(b!)? target_out) -> ()",
    _write_over,
    lambda *args: None,
)
