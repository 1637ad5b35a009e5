"""What `checks/kernels.py` times: our operators beside the PyTorch operators that do the same.

Every call makes its result anew, ours and theirs, as an unfused model would. Bytes are what the
operation has to read and write at least, not what a candidate moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepfuse.engine.sampling.plan import step_table
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import spaced_timesteps
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels import philox
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.step_row import Column

Inputs = dict[str, Any]
Run = Callable[[Inputs], Any]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# relative error over a whole tensor: the rounding of the result, and of PyTorch's in between
TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2, "fp32": 2e-5}
GROUPS, EPS = 32, 1e-5
STEPS, ROW, GUIDANCE = 50, 20, 7.5
LATENTS = {"small": (2, 4, 64, 64), "large": (512, 4, 64, 64)}
IMAGES = ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8))
TINY_LATENTS = {"small": (2, 4, 8, 8), "large": (3, 4, 8, 8)}
TINY_IMAGES = ((2, 64, 8, 8), (2, 32, 4, 4))


@dataclass(frozen=True)
class KernelCase:
    """One operation on one shape.

    Args:
        op, shape, dtype: what is timed; ``dtype`` is a name of `DTYPES`.
        variant: what else tells it from others.
        nbytes: read and written at least.
        make: tensors of one launch, with memory of their own.
        ours, native: the operation on such tensors.
        exact: what ``ours`` gives, in float64.
        drawn: whether ``native`` draws numbers of its own, with other results.
    """

    op: str
    variant: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    make: Callable[[], Inputs]
    ours: Run
    native: Run
    exact: Callable[[Inputs], Any]
    drawn: bool = False

    @property
    def name(self) -> str:
        """For people and for `named`."""
        size = "x".join(map(str, self.shape))
        return " ".join(word for word in (self.op, self.variant, size, self.dtype) if word)


def cases(device: torch.device) -> Iterator[KernelCase]:
    """All of them, those that matter most first."""
    small = device.type != "cuda"
    images, latents = (TINY_IMAGES, TINY_LATENTS) if small else (IMAGES, LATENTS)
    for dtype in DTYPES:
        for shape in images:
            yield group_norm(device, shape, dtype, "NHWC add")
        yield from (latent(device, latents["large"], dtype) for latent in LATENT_CASES)
        if dtype == "fp16":
            for variant in ("NHWC", "NCHW"):
                yield from (group_norm(device, shape, dtype, variant) for shape in images)
            yield from (latent(device, latents["small"], dtype) for latent in LATENT_CASES)
            yield from (backward(device, shape, dtype) for shape in images)


def group_norm(
    device: torch.device, shape: tuple[int, ...], dtype: str, variant: str
) -> KernelCase:
    """silu(GroupNorm(x)), or of x + add; ``variant`` names the layout of x and the operand."""
    kind, (count, channels) = DTYPES[dtype], shape[:2]
    weight, bias = _normal(device, torch.float32, 2, channels).to(kind)
    last = variant.startswith("NHWC")
    layout = torch.channels_last if last else torch.contiguous_format

    def make() -> Inputs:
        x = _normal(device, kind, *shape).to(memory_format=layout)
        return {"x": x, "add": _normal(device, kind, count, channels) if "add" in variant else None}

    def ours(inputs: Inputs) -> Tensor:
        return group_norm_silu(inputs["x"], weight, bias, GROUPS, EPS, add=inputs["add"])

    def native(inputs: Inputs) -> Tensor:
        x, add = inputs["x"], inputs["add"]
        x = x if add is None else x + add[:, :, None, None]
        return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))

    def exact(inputs: Inputs) -> Tensor:
        wide = [inputs["x"].double(), weight.double(), bias.double()]
        add = None if inputs["add"] is None else inputs["add"].double()
        return group_norm_silu(*wide, GROUPS, EPS, add=add, backend="reference")

    nbytes = 2 * torch.Size(shape).numel() * kind.itemsize
    return KernelCase(
        "group_norm_silu", variant, shape, dtype, nbytes, make, ours, native, exact
    )  # fmt: skip


def backward(device: torch.device, shape: tuple[int, ...], dtype: str) -> KernelCase:
    """The gradient of silu(GroupNorm(x)); PyTorch's from what its forward keeps for it."""
    kind, (count, channels) = DTYPES[dtype], shape[:2]
    pixels = torch.Size(shape[2:]).numel()
    weight, bias = _normal(device, torch.float32, 2, channels).to(kind)
    aten, own = torch.ops.aten, torch.ops.stepfuse.group_norm_silu_backward

    def make() -> Inputs:
        x, grad = _normal(device, kind, *shape), _normal(device, kind, *shape)
        kept = aten.native_group_norm(x, weight, bias, count, channels, pixels, GROUPS, EPS)
        return {"x": x, "grad": grad, **dict(zip(("normed", "mean", "rstd"), kept, strict=True))}

    def ours(inputs: Inputs) -> Tensor:
        wanted = [True, True, True, False, False, False]
        operands = (weight, bias, GROUPS, EPS, None, None, None, True, "auto", wanted)
        d_x: Tensor = own(inputs["grad"], inputs["x"], *operands)[0]
        return d_x

    def native(inputs: Inputs) -> Tensor:
        grad = aten.silu_backward(inputs["grad"], inputs["normed"])
        statistics = (inputs["mean"], inputs["rstd"], weight, count, channels, pixels, GROUPS)
        d_x: Tensor = aten.native_group_norm_backward(grad, inputs["x"], *statistics, [True] * 3)[0]
        return d_x

    def exact(inputs: Inputs) -> Tensor:
        x = inputs["x"].double().requires_grad_()
        with torch.enable_grad():
            y = F.silu(F.group_norm(x, GROUPS, weight.double(), bias.double(), EPS))
            return torch.autograd.grad(y, x, inputs["grad"].double())[0]

    nbytes = 3 * torch.Size(shape).numel() * kind.itemsize
    return KernelCase(
        "group_norm_silu_backward", "NCHW", shape, dtype, nbytes, make, ours, native, exact
    )  # fmt: skip


def noising(device: torch.device, shape: tuple[int, ...], dtype: str, drawn: bool) -> KernelCase:
    """x_t of x_0 and noise, given or drawn inside."""
    kind, count = DTYPES[dtype], shape[0]
    abar = abar_on_cpu().to(device)
    signal, sigma = abar.sqrt().to(kind), (1 - abar).sqrt().to(kind)
    counters = {"seed": torch.full((count,), 7, device=device)}
    counters["sample"] = torch.arange(count, device=device)

    def make() -> Inputs:
        t = torch.randint(0, len(abar), (count,), device=device)
        noise = None if drawn else _normal(device, kind, *shape)
        return {"x0": _normal(device, kind, *shape), "noise": noise, "t": t}

    def ours(inputs: Inputs) -> Any:
        more = counters if drawn else {}
        return add_noise(inputs["x0"], inputs["noise"], inputs["t"], abar, **more)

    def native(inputs: Inputs) -> Tensor:
        x0, t = inputs["x0"], inputs["t"]
        noise = torch.randn_like(x0) if drawn else inputs["noise"]
        mixed: Tensor = _column(signal[t]) * x0 + _column(sigma[t]) * noise
        return mixed

    def exact(inputs: Inputs) -> Tensor:
        a, noise = _column(abar[inputs["t"]]), inputs["noise"]
        if drawn:
            noise = philox.normal(
                *counters.values(), inputs["t"], shape[1:], "reference", dtype=torch.float64
            )
        return a.sqrt() * inputs["x0"].double() + (1 - a).sqrt() * noise.double()

    nbytes = (2 if drawn else 3) * torch.Size(shape).numel() * kind.itemsize
    variant = "noise drawn" if drawn else "noise given"
    return KernelCase(
        "add_noise", variant, shape, dtype, nbytes, make, ours, native, exact, drawn
    )  # fmt: skip


def stepping(device: torch.device, shape: tuple[int, ...], dtype: str, variant: str) -> KernelCase:
    """One update: "ddim", "ddpm" with its noise drawn inside, or "cfg": ddim of a batch of 2N."""
    kind, count = DTYPES[dtype], shape[0]
    guided, noisy = variant == "cfg", variant == "ddpm"
    wide, (p_x, p_o, c_x, c_o, c_0, sigma, clip) = rows_on_cpu(noisy, guided)
    wide = wide.to(device)
    table, step = wide.float(), torch.full((1,), ROW, device=device)
    counters: Inputs = {}
    if noisy:
        counters["seed"] = torch.full((count,), 7, device=device)
        counters["sample"] = torch.arange(count, device=device)
    outputs = (2 * count if guided else count, *shape[1:])

    def make() -> Inputs:
        return {"x": _normal(device, kind, *shape), "output": _normal(device, kind, *outputs)}

    def ours(inputs: Inputs) -> Any:
        return denoise_step(inputs["x"], inputs["output"], table, step, **counters)

    def native(inputs: Inputs) -> Tensor:
        x, o = inputs["x"], inputs["output"]
        if guided:
            without, given = o.chunk(2)
            o = without + GUIDANCE * (given - without)
        x0 = (p_x * x + p_o * o).clamp(-clip, clip)
        x_s: Tensor = c_x * x + c_o * o + c_0 * x0
        return x_s + sigma * torch.randn_like(x) if noisy else x_s

    def exact(inputs: Inputs) -> Any:
        x, output = inputs["x"].double(), inputs["output"].double()
        return denoise_step(x, output, wide, step, backend="reference", **counters)

    nbytes = (4 if guided else 3) * torch.Size(shape).numel() * kind.itemsize
    return KernelCase(
        "denoise_step", variant, shape, dtype, nbytes, make, ours, native, exact, noisy
    )  # fmt: skip


def drawing(device: torch.device, shape: tuple[int, ...], dtype: str) -> KernelCase:
    """Normal noise."""
    kind = DTYPES[dtype]

    def make() -> Inputs:
        sample = torch.arange(shape[0], device=device)
        filled = {"seed": torch.full_like(sample, 7), "step": torch.full_like(sample, 500)}
        return {"sample": sample, **filled}

    def ours(inputs: Inputs) -> Tensor:
        counters = inputs["seed"], inputs["sample"], inputs["step"]
        return philox.normal(*counters, shape[1:], dtype=kind)

    def native(inputs: Inputs) -> Tensor:
        return torch.randn(shape, dtype=kind, device=device)

    def exact(inputs: Inputs) -> Tensor:
        counters = inputs["seed"], inputs["sample"], inputs["step"]
        return philox.normal(*counters, shape[1:], "reference", dtype=torch.float64)

    nbytes = torch.Size(shape).numel() * kind.itemsize
    return KernelCase("philox", "", shape, dtype, nbytes, make, ours, native, exact, True)


@functools.cache
def abar_on_cpu() -> Tensor:
    """float64 [T]."""
    return Schedule.linear().alphas_cumprod


@functools.cache
def rows_on_cpu(noisy: bool, guided: bool) -> tuple[Tensor, list[float]]:
    """A step table, float64, and the first numbers of its row `ROW`.

    With those on the host, PyTorch's operators have constants and look nothing up.
    """
    update = Update("ddpm" if noisy else "ddim", rederive_epsilon=False)
    table = step_table(Schedule.linear(), spaced_timesteps(1000, STEPS), update)
    table[:, Column.GUIDANCE] = GUIDANCE if guided else 1.0
    return table, table[ROW, : Column.CLIP + 1].tolist()


LATENT_CASES: tuple[Callable[[torch.device, tuple[int, ...], str], KernelCase], ...] = (
    *(functools.partial(stepping, variant=variant) for variant in ("ddim", "ddpm", "cfg")),
    *(functools.partial(noising, drawn=drawn) for drawn in (False, True)),
    drawing,
)


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
