"""The kernel variants the engine launches, at the sizes of the networks it is made for.

Each is a call of a launcher on meta tensors, with what it must move and what the same formula moves
as separate PyTorch operators. The compile checks and the static table are made from this list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepfuse.kernels.triton import add_noise, denoise_step, group_norm_silu, philox
from stepfuse.kernels.triton.ahead import Compiled, Resources, compiling
from stepfuse.kernels.triton.group_norm_silu_backward import ONE_PASS
from stepfuse.kernels.triton.group_norm_silu_plan import plan

Launch = Callable[[], None]
# arguments of the size of x: what memory bandwidth is spent on
BULK = {
    "x", "x0", "out", "noise", "target", "model_output", "uncond", "x0_out", "history",
    "grad", "dx",
}  # fmt: skip
# arrays in local memory and constant tables, which a slow sine or logarithm brings, library calls,
# float64 division and roots
UNWANTED = re.compile(
    r"^[^/]*((?<!\w)\.(local|const)\b|\.(local|const)\.|\bcall\b|(div|sqrt)\.rn\.f64)"
)


@dataclass(frozen=True)
class Variant:
    """One use of an op: how it is launched, and the bytes it has to move at least."""

    op: str
    title: str
    elements: int  # of x
    bytes: int
    launch: Launch
    unfused: Callable[[], Any] | None  # the same in PyTorch's operators, on meta tensors

    @property
    def name(self) -> str:
        """For tables and test ids."""
        return f"{self.op}: {self.title}"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel of a variant, as plain data."""

    variant: str
    kernel: str
    arch: int
    programs: int
    warps: int
    resources: Resources
    accesses: dict[str, dict[str, set[int]]]
    suspicious: tuple[str, ...]  # PTX that should not be there


def compiled(arch: int) -> list[Kernel]:
    """Every kernel of every variant for sm_<arch>."""
    kernels = []
    for variant in variants():
        with compiling(arch) as log:
            variant.launch()
        kernels += [_facts(variant, item) for item in log]
    return kernels


def _facts(variant: Variant, item: Compiled) -> Kernel:
    found = tuple(line.strip() for line in item.ptx.splitlines() if UNWANTED.search(line))
    return Kernel(
        variant.name, item.name.strip("_"), item.arch, item.programs, item.warps, item.resources,
        item.accesses(), found,
    )  # fmt: skip


def variants() -> list[Variant]:
    """All of them; building the list allocates nothing."""
    found = [
        _add_noise("noise given", torch.bfloat16, drawn=False, target=False),
        _add_noise("drawn, v target", torch.float32, drawn=True, target=True),
        _denoise("no noise", torch.bfloat16),
        _denoise("noise drawn", torch.bfloat16, drawn=True),
        _denoise("drawn, guidance, learned variance", torch.bfloat16, True, True, True),
        _denoise("noise given, x0 output", torch.float32, given=True, x0=True),
        _denoise("history of 1", torch.float32, slots=1),
        _denoise("history of 3, drawn, guidance", torch.bfloat16, True, True, slots=3),
        _denoise("no noise, odd size", torch.bfloat16, size=31),
        _denoise("noise drawn, odd size", torch.float16, drawn=True, size=31),
        _initial(),
        _group_norm("DDPM", (64, 128, 32, 32), torch.bfloat16),
        _group_norm("DDPM", (64, 128, 32, 32), torch.bfloat16, last=True),
        _group_norm("ADM-64, AdaGN and add", (8, 192, 64, 64), torch.bfloat16, adagn=True),
        _group_norm("SD", (8, 320, 64, 64), torch.bfloat16),
        _group_norm("SD", (8, 320, 64, 64), torch.bfloat16, last=True, adagn=True),
        _group_norm("SD", (8, 960, 32, 32), torch.float32),
        _group_norm("SD, no act", (8, 640, 16, 16), torch.float32, last=True, silu=False),
        _group_norm("SD", (8, 1280, 8, 8), torch.float16),
        _gradient("DDPM", (64, 128, 32, 32), torch.bfloat16),
        _gradient("SD", (8, 320, 64, 64), torch.bfloat16, last=True),
    ]
    return found


def _meta(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if last else x


def _indices(n: int) -> Tensor:
    return _meta(n, dtype=torch.int64)


def _title(name: str, x: Tensor, last: bool = False) -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{name}, {'x'.join(map(str, x.shape))} {dtype}{' channels-last' if last else ''}"


def _add_noise(name: str, dtype: torch.dtype, drawn: bool, target: bool) -> Variant:
    x = _meta(64, 3, 64, 64, dtype=dtype)
    noise, v = None if drawn else x.clone(), x.clone() if target else None
    abar = _meta(1000, dtype=torch.float64)
    n, seeds = _indices(64), _indices(64) if drawn else None

    def launch() -> None:
        add_noise.run(x, noise, n, abar, seeds, seeds, x.clone(), v, True)

    def unfused() -> object:
        signal = _meta(64, 1, 1, 1, dtype=dtype)
        eps = torch.randn_like(x) if drawn else x
        return signal * x + signal * eps, signal * eps - signal * x if target else None

    passes = 2 + (not drawn) + target
    return Variant("add_noise", _title(name, x), x.numel(), passes * x.nbytes, launch, unfused)


def _denoise(
    name: str,
    dtype: torch.dtype,
    drawn: bool = False,
    guided: bool = False,
    learned: bool = False,
    given: bool = False,
    x0: bool = False,
    size: int = 64,
    slots: int = 0,
) -> Variant:
    samples = 64 if size % 4 == 0 else 63  # an odd size is odd in all
    x = _meta(samples, 3, size, size, dtype=dtype)
    o = _meta(samples, 6 if learned else 3, size, size, dtype=dtype)
    uncond, noise = o.clone() if guided else None, x.clone() if given else None
    seeds = _indices(samples) if drawn else None
    table = _meta(50, 16, dtype=torch.float32)
    memory: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if slots:
        memory = _meta(slots, *x.shape, dtype=torch.float32), _meta(50, 8, dtype=torch.float32)

    def launch() -> None:
        predicted = x.clone() if x0 else None
        out = x.clone()
        denoise_step.run(
            x, o, uncond, table, _indices(1), noise, seeds, seeds, learned, out, predicted, *memory
        )

    def unfused() -> object:
        c = _meta(1, dtype=dtype)
        eps, variance = (o[:, :3], o[:, 3:]) if learned else (o, o)
        if guided:
            eps = eps + c * (eps - eps)
        predicted = ((x - c * eps) / c).clamp(-1, 1)
        out = c * predicted + c * ((x - c * predicted) / c)
        for _ in range(slots):
            out = out + c * x
        if learned:
            fraction = (variance + 1) / 2
            std = torch.exp(0.5 * (fraction * c + (1 - fraction) * c))
            return out + std * torch.randn_like(x)
        return out + c * (torch.randn_like(x) if drawn else x) if drawn or given else out

    # reads x and the output (both of them with guidance, and the variance once), writes x_s
    passes = 3 + guided + learned + given + x0
    # and reads each slot of a history and writes one
    least = passes * x.nbytes + (slots + 1 if slots else 0) * 4 * x.numel()
    return Variant("denoise_step", _title(name, x), x.numel(), least, launch, unfused)


def _initial() -> Variant:
    x = _meta(64, 3, 64, 64, dtype=torch.float32)
    n = _indices(64)
    title = _title("initial noise", x)
    return Variant(
        "philox", title, x.numel(), x.nbytes, lambda: philox.fill(x, n, n, n),
        lambda: torch.randn_like(x),
    )  # fmt: skip


def _group_norm(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    last: bool = False,
    adagn: bool = False,
    silu: bool = True,
) -> Variant:
    x = _meta(*shape, dtype=dtype, last=last)
    n, c = shape[:2]
    w = _meta(c, dtype=torch.float32)
    row = _meta(n, c, dtype=dtype) if adagn else None

    def launch() -> None:
        group_norm_silu.run(x, w, w, 32, 1e-5, row, row, row, silu, torch.empty_like(x))

    def unfused() -> object:
        gain = w.to(dtype)
        h = x if row is None else x + row[:, :, None, None]
        h = F.group_norm(h, 32, gain, gain)
        if row is not None:
            h = h * (1 + row[:, :, None, None]) + row[:, :, None, None]
        return F.silu(h) if silu else h

    once = plan(x, 32).one_pass
    title = _title(f"{name}, {'one pass' if once else 'split'}", x, last)
    return Variant(
        "group_norm_silu", title, x.numel(), (2 if once else 3) * x.nbytes, launch, unfused
    )


def _gradient(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, last: bool = False
) -> Variant:
    x = _meta(*shape, dtype=dtype, last=last)
    w = _meta(shape[1], dtype=torch.float32)

    def launch() -> None:
        group_norm_silu.backward(
            x.clone(), x, w, w, 32, 1e-5, None, None, None, True, torch.empty_like(x),
            w.clone(), w.clone(), None, None, None,
        )  # fmt: skip

    once = plan(x, 32, ONE_PASS).one_pass
    # x for the statistics; x and grad for the sums; x and grad again, dx
    passes = 3 if once else 6
    title = _title(f"{name} backward, {'one pass' if once else 'split'}", x, last)
    return Variant("group_norm_silu", title, math.prod(shape), passes * x.nbytes, launch, None)
