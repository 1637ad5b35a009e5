"""One DDPM, DDIM, DDGAN or inversion update in one pass over x and the model output."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.kernels.backends import implementation, resolve
from stepfuse.kernels.checks import check_float, check_like, per_sample, sample_indices
from stepfuse.kernels.step_row import COLUMNS


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Go from x_t to x_s by row ``step`` of a step table.

        o   = o_uncond + guidance (o_cond - o_uncond)
        x0  = clamp(p_x x + p_o o)
        x_s = c_x x + c_o o + c_0 x0 + sigma z

    DDPM (Ho et al. 2020), eq. 6-7 and 11; DDIM (Song et al. 2021), eq. 12; classifier-free guidance
    (Ho & Salimans 2022), eq. 6; learned variance (Nichol & Dhariwal 2021), eq. 15. The coefficients
    are those of `stepfuse.kernels.step_row`; `stepfuse.engine.table` computes them.

    Args:
        x: x_t, [N, C, ...].
        model_output: [N, C, ...], or [N, 2C, ...] with the variance in the second half, or a batch
            of 2N (unconditional half first) for classifier-free guidance.
        table: [S, 16]. float32 for the fast backends; float64 is kept for float64 x.
        step: which row: an int, or int64 [1] on the device of x, which is not read on the host.
        uncond_output: the unconditional model output where it is a tensor of its own.
        noise: z, of the shape of x. With neither ``noise`` nor ``seed`` no noise is added.
        seed, sample: draw z inside; see `stepfuse.kernels.philox`.
        learned_variance: use the second half of the model output's channels.
        return_x0: also return the clipped x0.
        inplace: write x_s over x.
        backend: "auto", "reference", "cpp" or "triton".

    Returns x_s, or (x_s, x0), of the dtype of x.
    """
    check_float("x", x)
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must have shape [N, C, ...] and hold something; got {tuple(x.shape)}")
    count, channels = x.shape[:2]
    if uncond_output is None and model_output.shape[0] == 2 * count:
        uncond_output, model_output = model_output[:count], model_output[count:]
    outputs = (channels, 2 * channels)[model_output.dim() > 1 and model_output.shape[1] != channels]
    check_like("model_output", model_output, (count, outputs, *x.shape[2:]), x)
    if uncond_output is not None:
        check_like("uncond_output", uncond_output, model_output.shape, x)
    if learned_variance and outputs == channels:
        raise ValueError(f"a learned variance needs {2 * channels} output channels; got {outputs}")
    if table.dim() != 2 or table.shape[1] != COLUMNS:
        raise ValueError(f"table must have shape [S, {COLUMNS}]; got {tuple(table.shape)}")
    if noise is not None and seed is not None:
        raise ValueError("give noise or seed, not both")
    if isinstance(step, int):
        if not 0 <= step < table.shape[0]:
            raise IndexError(f"step must be in 0 .. {table.shape[0] - 1}; got {step}")
        step = torch.full((1,), step, dtype=torch.int64, device=x.device)
    seeds = samples = None
    if noise is not None:
        check_like("noise", noise, x.shape, x)
    elif seed is not None:
        seeds = per_sample("seed", seed, count, x.device)
        samples = sample_indices(sample, count, x.device)
    out = x if inplace else torch.empty_like(x)
    x0_out = torch.empty_like(x) if return_x0 else None
    run = implementation("denoise_step", resolve(backend, x.device, x.dtype)).run
    run(
        x,
        model_output,
        uncond_output,
        table,
        step,
        noise,
        seeds,
        samples,
        learned_variance,
        out,
        x0_out,
    )
    return out if x0_out is None else (out, x0_out)
