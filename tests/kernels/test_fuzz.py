"""Every op of the C++ module on seeded odd shapes, dtypes and strides, against its reference.

`make sanitize` runs these where the module checks each access to memory and each operation.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from denoise_cases import VARIANTS, arguments, check
from op_cases import NORMAL, Poisoned, assert_within, distance
from torch import Tensor

pytest.importorskip("stepfuse.kernels.cpp.module", reason="needs the C++ module (a C++ compiler)")

from stepfuse.kernels import philox
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.attention import attention
from stepfuse.kernels.concatenate import concatenate
from stepfuse.kernels.convolve import convolve
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.filters import FORMS, filters, fits
from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.products import vector_channels, why_not
from stepfuse.kernels.reference import attention as attention_reference
from stepfuse.kernels.reference import convolve as convolve_reference
from stepfuse.kernels.reference import group_norm_silu as group_norm_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = tuple(dtype for dtype in DTYPES[:2] if not why_not(dtype))
SEEDS = range(40)
# an expression of a dozen float32 operations, and sums of up to a few hundred terms
ARITHMETIC = 1e-5
# relative L2: of float32 sums in another order, and of a few roundings to 8 or 11 bits
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
seeded = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture
def draw(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def shape_of(draw: random.Random, least: int = 2) -> tuple[int, ...]:
    """[N, C, ...] around the edges of vectors and batches of them, seldom of more than 4000."""
    rank = draw.randint(least, 5)
    edges = (1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33)
    shape = [draw.choice((1, 2, 3)), *(draw.choice(edges) for _ in range(rank - 1))]
    while torch.Size(shape).numel() > 4000:
        shape[draw.randrange(len(shape))] = 1
    if draw.random() < 0.2:
        shape[-1] = draw.choice((63, 64, 65, 127, 129, 257))
    return tuple(shape)


def ordered(draw: random.Random, x: Tensor) -> Tensor:
    """The same numbers in another order of dimensions."""
    kind = draw.choice(("dense", "channels last", "turned"))
    if kind == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "turned":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x.contiguous()


def laid(draw: random.Random, x: Tensor) -> Tensor:
    """The same numbers in another order, with gaps between them, or at an odd address."""
    kind = draw.choice(("ordered", "gaps", "late"))
    if kind == "gaps":
        return torch.stack([x, x * torch.nan], -1)[..., 0]
    if kind == "late":  # takes no wide access
        memory = torch.full((x.numel() + 3,), torch.nan, dtype=x.dtype)
        return memory[3:].view(x.shape).copy_(x)
    return ordered(draw, x)


def normals(draw: random.Random, shape: Any, dtype: torch.dtype) -> Tensor:
    return laid(draw, torch.randn(shape, dtype=torch.float64).to(dtype))


def words(count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,))


@seeded
def test_philox(draw: random.Random) -> None:
    (count, *shape), dtype = shape_of(draw), draw.choice(DTYPES)
    counters = words(count), words(count), torch.randint(0, 2**32 - 1, (count,))
    wanted = torch.empty((count, *shape), dtype=dtype)
    out = Poisoned(wanted, draw.choice((64, 63, 1)))
    philox.normal(*counters, shape, "cpp", out=out.tensor)
    exact = philox.normal(*counters, shape, "reference", dtype=torch.float64)
    assert_within(out.check(), exact, NORMAL)
    found = philox.integers(*counters, shape, "cpp")
    assert torch.equal(found, philox.integers(*counters, shape, "reference"))


@seeded
def test_add_noise(draw: random.Random) -> None:
    shape, dtype = shape_of(draw), draw.choice(DTYPES)
    count, target = shape[0], draw.choice((None, "epsilon", "v_prediction"))
    x0 = normals(draw, shape, dtype)
    abar = torch.rand(17, dtype=torch.float64)
    t = torch.randint(0, 17, (count,))
    drawn = draw.random() < 0.5
    given: dict[str, Any] = {"noise": None if drawn else normals(draw, shape, dtype)}
    given |= {"seed": words(count), "sample": words(count)} if drawn else {}
    out, goal = (Poisoned(ordered(draw, x0), draw.choice((64, 1))) for _ in range(2))
    wanted = {"target": target, "target_out": goal.tensor} if target else {}
    exact = add_noise(
        x0.double(),
        None if drawn else given["noise"].double(),
        t, abar, target=target, backend="reference",
        **({k: v for k, v in given.items() if k != "noise"}),
    )  # fmt: skip
    add_noise(x0, t=t, alphas_cumprod=abar, out=out.tensor, backend="cpp", **given, **wanted)
    pairs = [(out, exact)] if target is None else zip((out, goal), exact, strict=True)
    for found, right in pairs:
        assert_within(found.check(), right, ARITHMETIC)


@seeded
def test_denoise_step(draw: random.Random) -> None:
    shape, dtype = shape_of(draw), draw.choice(DTYPES)
    layout: Any = draw.choice(("contiguous", "channels_last", "transposed"))
    given = arguments(
        draw.choice(VARIANTS), shape, dtype, layout, draw.choice((None, torch.float32))
    )
    for name in ("x", "model_output", "uncond_output", "noise"):
        if name in given:
            given[name] = laid(draw, given[name])
    out, x0 = (Poisoned(ordered(draw, given["x"]), draw.choice((64, 3))) for _ in range(2))
    denoise_step(**given, out=out.tensor, x0_out=x0.tensor, backend="cpp")
    check(given, out.check(), x0.check())


def modulation(draw: random.Random, shape: tuple[int, ...]) -> Tensor | None:
    """[C] or [N, C] of any dtype, some of them halves of a wider tensor; or nothing."""
    if draw.random() < 0.3:
        return None
    v = torch.randn(*shape[:-1], 2 * shape[-1]).to(draw.choice(DTYPES))
    return v[..., : shape[-1]] if draw.random() < 0.5 else v[..., ::2]


@seeded
def test_group_norm_silu(draw: random.Random) -> None:
    shape, dtype = shape_of(draw), draw.choice(DTYPES)
    count, channels = shape[:2]
    groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    x = normals(draw, shape, dtype) + draw.choice((0, 3))
    weight, bias = (modulation(draw, (channels,)) for _ in range(2))
    scale, shift, add = (modulation(draw, (count, channels)) for _ in range(3))
    silu = draw.random() < 0.5
    eps = draw.choice((1e-5, 1e-2))
    parameters = (weight, bias, groups, eps, scale, shift, add)
    wide = [v.double() if isinstance(v, Tensor) else v for v in parameters]
    out = Poisoned(ordered(draw, x), draw.choice((64, 5)))
    act = "silu" if silu else "none"
    group_norm_silu(x, *parameters, act, "cpp", out=out.tensor)  # type: ignore[arg-type]
    exact = group_norm_reference.formula(x.double(), *wide, silu)
    # a group whose numbers hardly differ has its rounding multiplied by 1 / sqrt(eps)
    size = float(exact.abs().max()) + float(x.double().abs().max()) * eps**-0.5
    assert_within(out.check(), exact, ARITHMETIC * size)


@seeded
def test_group_norm_silu_backward(draw: random.Random) -> None:
    shape, dtype = shape_of(draw), draw.choice(DTYPES)
    count, channels = shape[:2]
    groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    parameters = [modulation(draw, (channels,)) for _ in range(2)]
    parameters += [modulation(draw, (count, channels)) for _ in range(3)]
    given = [normals(draw, shape, dtype), *parameters]
    leaves = [None if v is None else v.detach().requires_grad_(draw.random() < 0.8) for v in given]
    x, weight, bias, scale, shift, add = leaves
    assert x is not None
    x.requires_grad_()
    silu, grad = draw.random() < 0.5, normals(draw, shape, dtype)
    act = "silu" if silu else "none"
    y = group_norm_silu(x, weight, bias, groups, 0.1, scale, shift, add, act, "cpp")  # type: ignore[arg-type]
    y.backward(grad)
    wide = [None if v is None else v.detach().double() for v in leaves]
    exact = [None if v is None else torch.empty_like(v) for v in wide]
    group_norm_reference.backward(
        grad.double(), wide[0], *wide[1:3], groups, 0.1, *wide[3:], silu, *exact  # type: ignore[arg-type]
    )  # fmt: skip
    largest = max(float(v.abs().max()) for v in exact if v is not None)
    for leaf, right in zip(leaves, exact, strict=True):
        if leaf is None or not leaf.requires_grad:
            assert leaf is None or leaf.grad is None
            continue
        assert leaf.grad is not None
        assert right is not None
        found = float((leaf.grad.double() - right).norm())
        # sums that cancel are as exact as their terms
        allowed = RELATIVE[leaf.dtype] * float(right.norm()) + 1e-5 * largest * right.numel() ** 0.5
        assert found <= 2 * allowed, (leaf.shape, found, allowed)


@seeded
@torch.no_grad()
def test_convolve(draw: random.Random) -> None:
    dtype, wide = draw.choice(PRODUCTS), vector_channels()
    n, h, w = draw.choice((1, 2, 3)), draw.choice((1, 2, 3, 4, 7, 9)), draw.choice((1, 2, 5, 6, 12))
    channels, results = (wide * draw.choice((1, 2, 3)) for _ in range(2))
    shape = torch.Size((n, channels, h, w))
    form = draw.choice([f for f in FORMS if fits(shape, results, f)])
    stride = draw.choice((1, 2)) if form == "direct" else 1
    x = laid(draw, torch.randn(shape).to(dtype))
    kernel = 1 if form == "dense" else 3
    weight = torch.randn(results, channels, kernel, kernel) / channels**0.5
    bias = torch.randn(results) if draw.random() < 0.5 else None
    split = channels - wide
    apart = split > 0 and draw.random() < 0.5
    norm: tuple[Any, ...] = (0, 1e-2, None, None, None, None, None, False)
    if draw.random() < 0.5:
        groups = draw.choice([g for g in (1, 2, 4, 8) if channels % g == 0])
        scale, shift, add = (modulation(draw, (n, channels)) for _ in range(3))
        norm = (groups, 1e-2, torch.randn(channels), None, scale, shift, add, True)

    def exactly(residual: Tensor | None) -> Tensor:
        given = (x, weight, bias, residual, form, stride, *norm)
        wide = (v.double() if isinstance(v, Tensor) else v for v in given)
        return convolve_reference.formula(*wide)

    exact, residual = exactly(None), None
    if draw.random() < 0.5:
        residual = laid(draw, torch.randn(exact.shape).to(dtype))
        exact = exactly(residual)
    u = filters(weight, form, dtype, plain=draw.random() < 0.5)
    images = (x[:, :split], x[:, split:]) if apart else (x, None)
    found = convolve(images[0], u, bias, residual, form, stride, *norm, images[1])
    assert distance(found, exact) < RELATIVE[dtype], (form, shape, apart)


@seeded
@torch.no_grad()
def test_linear(draw: random.Random) -> None:
    dtype, wide = draw.choice(PRODUCTS), vector_channels()
    n, length = draw.choice((1, 2, 3)), draw.choice((1, 3, 12, 13, 65))
    channels, results = (wide * draw.choice((1, 2, 5)) for _ in range(2))
    x = laid(draw, torch.randn(n, length, channels).to(dtype))
    weight = torch.randn(results, channels) / channels**0.5
    exact = F.linear(x.double(), weight.double())
    found = convolve(x, filters(weight, "dense", dtype))
    assert distance(found, exact) < RELATIVE[dtype]


@seeded
@torch.no_grad()
def test_attention(draw: random.Random) -> None:
    dtype = draw.choice(PRODUCTS)
    n, heads = draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
    queries, keys = (draw.choice((1, 2, 11, 12, 13, 33, 70)) for _ in range(2))
    width, values = 2 * draw.choice((1, 3, 4, 8, 17, 40)), draw.choice((1, 5, 16, 17, 33, 80))
    q = laid(draw, torch.randn(n, heads, queries, width).to(dtype))
    k = laid(draw, torch.randn(n, heads, keys, width).to(dtype))
    v = laid(draw, torch.randn(n, heads, keys, values).to(dtype))
    scale = draw.choice((1.0, width**-0.5))
    exact = attention_reference.formula(q.double(), k.double(), v.double(), scale)
    assert distance(attention(q, k, v, scale), exact) < RELATIVE[dtype]


@seeded
@torch.no_grad()
def test_concatenate(draw: random.Random) -> None:
    dtype = draw.choice((*DTYPES, torch.float64, torch.int8))
    n, h, w = (draw.choice((1, 2, 3, 5, 17)) for _ in range(3))
    images = [
        laid(draw, (100 * torch.randn(n, draw.choice((1, 2, 3, 16, 33)), h, w)).to(torch.float32))
        for _ in range(draw.choice((1, 2, 3, 4)))
    ]
    images = [image.to(dtype) for image in images]
    assert torch.equal(concatenate(images), torch.cat(images, 1))


if "libasan" in os.environ.get("LD_PRELOAD", ""):

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("beyond", ["read", "written"])
    def test_the_sanitizer_sees_one_element_too_many(dtype: torch.dtype, beyond: str) -> None:
        """At a tail, which instruction sets read and write by means of their own."""
        code = f"""
import torch
from stepfuse.kernels.cpp.module import native
x, out = (torch.zeros(100 + (name != {beyond!r}), dtype={dtype}) for name in ("read", "written"))
index, table = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
addresses = (x.data_ptr(), x.data_ptr(), index.data_ptr(), table.data_ptr())
code = {DTYPES.index(dtype)}
native.add_noise(*addresses, 1, 0, 0, out.data_ptr(), 0, False, code, 1, 101, 1)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode != 0
        assert "ERROR: AddressSanitizer" in done.stderr
