"""One DDPM, DDIM, DDGAN or inversion update in one pass over x and the model output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepfuse.kernels import philox
from stepfuse.kernels.backends import function
from stepfuse.kernels.checks import (
    INDICES,
    as_integer,
    check_flag,
    check_float,
    check_like,
    check_out,
    per_sample,
    sample_indices,
)
from stepfuse.kernels.layout import buffer_for, cast, laid_out, layout_of, resolved
from stepfuse.kernels.memory import check_history
from stepfuse.kernels.overlap import check_memory
from stepfuse.kernels.reference.denoise_step import gradients, row_of
from stepfuse.kernels.registration import define, eager, raise_versions, records_gradient
from stepfuse.kernels.step_row import COLUMNS, Column


def denoise_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    uncond_output: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample: int | Tensor = 0,
    learned_variance: bool = False,
    return_x0: bool = False,
    inplace: bool = False,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    history: Tensor | None = None,
    history_table: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Go from x_t to x_s by row ``step`` of a step table.

        o   = o_uncond + guidance (o_cond - o_uncond)
        x0  = clamp(p_x x + p_o o)
        x_s = c_x x + c_o o + c_0 x0 + sigma z          + c_h0 h_0 + c_h1 h_1 + c_h2 h_2
        h_w <- h_x x + h_o o + h_0 x0                   with a history

    DDPM (Ho et al. 2020), eq. 6-7 and 11; DDIM (Song et al. 2021), eq. 12; classifier-free guidance
    (Ho & Salimans 2022), eq. 6; learned variance (Nichol & Dhariwal 2021), eq. 15. The coefficients
    are those of `stepfuse.kernels.step_row`; `stepfuse.engine.sampling.rows` computes them, and
    for solvers with a memory `stepfuse.engine.sampling.terms`.

    Args:
        x: x_t, [N, C, ...], float32, bfloat16, float16 or float64.
        model_output: [N, C, ...], or [N, 2C, ...] with the variance in the second half, or a batch
            of 2N (unconditional half first) for classifier-free guidance.
        table: [S, 16], a constant. float32 costs no conversion; float64 is kept for float64 x.
        step: which row: an int, or int64 [1] on the device of x, which is not read on the host.
        uncond_output: the unconditional model output where it is a tensor of its own.
        noise: z, of the shape of x. With neither ``noise`` nor ``seed`` no noise is added.
        seed, sample: draw z inside; see `stepfuse.kernels.philox`.
        learned_variance: use the second half of the model output's channels.
        return_x0: also return the clipped x0.
        inplace: write x_s over x.
        out, x0_out: where to write x_s and x0, of the shape and dtype of x; ``out`` may be x.
            Nothing is allocated where they are laid out like x. ``x0_out`` implies ``return_x0``.
            They must not overlap each other, themselves or an input, unless they are x, a model
            output or noise exactly.
        history: what was remembered, [K, N, C, ...] with K = 1, 2 or 3, written by rows that say
            so: float32, or float64 like x, each of the K laid out like x. One whose weight is 0 is
            not read and may hold anything.
        history_table: [S, 8], the second part of the rows.
        backend: "auto", "reference", "cpp" or "triton".

    Returns x_s, or (x_s, x0), of the dtype of x. Differentiable in x, the model outputs and the
    noise, twice too, unless it writes into ``out``, ``x0_out``, ``history`` or in place. Raises
    ValueError or TypeError for arguments that do not fit together, IndexError for a step outside
    the table, `BackendUnavailable` where ``backend`` cannot run. A step on another device than the
    CPU is not read on the host: x_s, x0 and the gradients are NaN where the table has no such row.
    """
    check_float("x", x)
    shape, device = x.shape, x.device
    if len(shape) < 2 or x.numel() == 0:
        raise ValueError(f"x must have shape [N, C, ...] and hold something; got {tuple(shape)}")
    for name, flag in (
        ("learned_variance", learned_variance),
        ("return_x0", return_x0),
        ("inplace", inplace),
    ):
        if flag is not True and flag is not False:
            check_flag(name, flag)
    _check_outputs(x, model_output, uncond_output, learned_variance)
    check_float("table", table)
    if table.dim() != 2 or table.shape[1] != COLUMNS:
        raise ValueError(f"table must have shape [S, {COLUMNS}]; got {tuple(table.shape)}")
    if table.device != device:
        raise ValueError(f"table must be on {device} like x; got {table.device}")
    if not isinstance(step, Tensor):
        step = as_integer("step", step, INDICES)
        if not 0 <= step < table.shape[0]:
            raise IndexError(f"step must be in 0 .. {table.shape[0] - 1}; got {step}")
        step = torch.full((1,), step, dtype=torch.int64, device=device)
    elif step.dtype is not torch.int64 or step.numel() != 1:
        raise ValueError(f"step must be an int or int64 [1]; got {step.dtype} {tuple(step.shape)}")
    elif step.device != device:
        raise ValueError(f"step must be on {device} like x; got {step.device}")
    if history is not None or history_table is not None:
        check_history(history, history_table, x, len(table))
    seeds = samples = None
    if noise is not None:
        if seed is not None:
            raise ValueError("give noise or seed, not both")
        check_like("noise", noise, shape, x)
    elif seed is not None:
        seeds = per_sample("seed", seed, shape[0], device)
        samples = sample_indices(sample, shape[0], device)
    if inplace:
        if out is not None:
            raise ValueError("give inplace=True or out, not both")
        out = x
    return_x0 = return_x0 or x0_out is not None
    inputs = (x, model_output, uncond_output, table, step, noise, seeds, samples)

    direct = eager(*inputs, out, x0_out, history)
    if out is None and x0_out is None and history is None and not direct:
        x_s, x0 = _OP(*inputs, learned_variance, return_x0, backend)
        return (x_s, x0) if return_x0 else x_s
    written = [tensor for tensor in (out, x0_out, history) if tensor is not None]
    if written and records_gradient((*inputs, history)):
        raise ValueError(
            "out=, inplace=True and history= record no gradient; call under torch.no_grad()"
        )
    if out is None:
        out = torch.empty_like(x)
    elif out is not x:
        check_out("out", out, x)
    if x0_out is not None:
        check_out("x0_out", x0_out, x)
    elif return_x0:
        x0_out = torch.empty_like(x)
    memory = {} if history is None else {"history": history, "history_table": history_table}
    if direct and written:
        _write_out(*inputs, learned_variance, backend, out=out, x0_out=x0_out, **memory)
    elif direct:
        _write(out, x0_out, *inputs, learned_variance, backend)
    elif out is x:
        _OP_INPLACE(*inputs, learned_variance, backend, x0_out, **memory)
    else:
        _OP_OUT(*inputs, learned_variance, backend, out=out, x0_out=x0_out, **memory)
    return out if x0_out is None else (out, x0_out)


def _check_outputs(x: Tensor, output: Tensor, uncond: Tensor | None, learned: bool) -> None:
    """ValueError unless the model output is [N, C or 2C, ...], or twice that for guidance."""
    shape = x.shape
    count, channels = shape[0], shape[1]
    if not isinstance(output, Tensor):
        check_float("model_output", output)
    given = output.shape
    if given == shape and uncond is None and not learned:
        check_like("model_output", output, shape, x)
        return
    if uncond is None and given[:1] == (2 * count,):
        count *= 2
    wide = len(given) > 1 and given[1] != channels
    outputs = channels * 2 if wide else channels
    check_like("model_output", output, (count, outputs, *shape[2:]), x)
    if uncond is not None:
        check_like("uncond_output", uncond, given, x)
    if learned and not wide:
        raise ValueError(f"a learned variance needs {2 * channels} output channels; got {outputs}")


def _halves(x: Tensor, output: Tensor, uncond: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(conditional, unconditional): a batch of 2N holds the unconditional half first."""
    count = x.shape[0]
    if uncond is None and output.shape[0] != count:
        return output[count:], output[:count]
    return output, uncond


def _write(
    out: Tensor,
    x0_out: Tensor | None,
    x: Tensor,
    model_output: Tensor,
    uncond_output: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample: Tensor | None,
    learned_variance: bool,
    backend: str,
    history: Tensor | None = None,
    history_table: Tensor | None = None,
) -> None:
    """Run a backend, on tensors of one layout and one dtype."""
    x, model_output, uncond_output, table, step, noise, seed, sample = resolved(
        x, model_output, uncond_output, table, step, noise, seed, sample
    )
    layout, dtype = layout_of(x), x.dtype
    cond, uncond = _halves(x, model_output, uncond_output)
    if cond.dtype is torch.float64:
        cond = cast(cond, dtype)
    cond = laid_out(cond, layout)
    if uncond is not None:
        uncond = laid_out(cast(uncond, cond.dtype), layout)
    if noise is not None:
        noise = laid_out(cast(noise, dtype), layout)
    if dtype is not torch.float64:
        table = cast(table, torch.float32)
    if history_table is not None:
        history_table = cast(history_table, table.dtype).contiguous()
    x_s = buffer_for(out, layout)
    x0 = None if x0_out is None else buffer_for(x0_out, layout)
    function("denoise_step", "run", backend, x)(
        laid_out(x, layout),
        cond,
        uncond,
        table.contiguous(),
        step,
        noise,
        seed,
        sample,
        learned_variance,
        x_s,
        x0,
        history,
        history_table,
    )
    if x_s is not out:
        out.copy_(x_s)
    if x0_out is not None and x0 is not None and x0 is not x0_out:
        x0_out.copy_(x0)


def _write_out(
    *args: Any,
    out: Tensor,
    x0_out: Tensor | None,
    history: Tensor | None = None,
    history_table: Tensor | None = None,
) -> None:
    x, output, uncond, table, step, noise, seed, sample, _, _ = args
    elementwise = {"x": x, "model_output": output, "uncond_output": uncond, "noise": noise}
    written = {"out": out, "x0_out": x0_out, "history": history}
    check_memory(written, elementwise, (table, step, seed, sample, history_table))
    every = (*args, history, history_table)
    _write(out, x0_out, *every)
    raise_versions([tensor for tensor in written.values() if tensor is not None])


def _write_over(
    x: Tensor, *args: Any, history: Tensor | None = None, history_table: Tensor | None = None
) -> None:
    *rest, x0_out = args
    _write_out(x, *rest, out=x, x0_out=x0_out, history=history, history_table=history_table)


def _functional(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, return_x0, backend = args
    inputs += [backend]
    out, x0 = _fake(x, *args)
    _write(out, x0 if return_x0 else None, x, *inputs)
    return out, x0


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The results, unfilled; an operator has a fixed number of them, so that no x0 is [0]."""
    return_x0 = args[-2]
    return torch.empty_like(x), torch.empty_like(x) if return_x0 else x.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8])
    ctx.learned_variance, ctx.return_x0, ctx.backend = inputs[8:]


def _backward(ctx: Any, d_out: Tensor | None, d_x0: Tensor | None) -> tuple[Any, ...]:
    x, model_output, uncond_output, table, step, noise, seed, sample = ctx.saved_tensors
    if ctx.needs_input_grad[3]:
        raise ValueError("denoise_step has no gradient for its table; detach it")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    row = row_of(table, step, dtype)
    if noise is None and seed is not None and ctx.learned_variance:
        timestep = row[Column.TIMESTEP].to(torch.int64).expand(x.shape[0])
        noise = philox.normal(
            seed, sample, timestep, x.shape[1:], ctx.backend, dtype=dtype, device=x.device
        )
    cond, uncond = _halves(x, model_output, uncond_output)
    d_x, d_cond, d_uncond, d_noise = gradients(
        d_out, d_x0 if ctx.return_x0 else None, x, cond, uncond, row, noise, ctx.learned_variance
    )
    if d_uncond is not None and uncond_output is None:
        d_cond, d_uncond = torch.cat((d_uncond, d_cond)), None
    given = (x, model_output, uncond_output, None, None, noise)
    grads = (d_x, d_cond, d_uncond, None, None, d_noise)
    wanted = [
        grad.to(tensor.dtype) if want and grad is not None and tensor is not None else None
        for grad, tensor, want in zip(grads, given, ctx.needs_input_grad[:6], strict=True)
    ]
    return (*wanted, *(None,) * 5)


_INPUTS = (
    "Tensor model_output, Tensor? uncond_output, Tensor table, Tensor step, "
    "Tensor? noise, Tensor? seed, Tensor? sample, bool learned_variance"
)
_MEMORY = "Tensor(c!)? history=None, Tensor? history_table=None"

_OP = define(
    f"denoise_step(Tensor x, {_INPUTS}, bool return_x0, str backend) -> (Tensor, Tensor)",
    _functional,
    _fake,
    setup=_setup,
    backward=_backward,
)
_OP_OUT = define(
    f"denoise_step_out(Tensor x, {_INPUTS}, str backend, *, "
    f"Tensor(a!) out, Tensor(b!)? x0_out, {_MEMORY}) -> ()",
    _write_out,
    lambda *args, **kwargs: None,
)
_OP_INPLACE = define(
    f"denoise_step_(Tensor(a!) x, {_INPUTS}, str backend, Tensor(b!)? x0_out, *, {_MEMORY}) -> ()",
    _write_over,
    lambda *args, **kwargs: None,
)
