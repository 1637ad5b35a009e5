"""The PTX that Triton compiles, executed on the CPU: numerics, races, and every byte counted.

Bounds and alignment of each access are checked by the simulator, which PTXSIM has to name; a byte
that one program writes and another touches is an error. Shapes are small and odd.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_modes import needs_compiler, needs_ptxsim, simulated

from stepfuse.kernels.reference import add_noise as add_noise_reference
from stepfuse.kernels.reference import denoise_step as denoise_reference
from stepfuse.kernels.reference import group_norm_silu as group_norm_reference
from stepfuse.kernels.reference import philox as philox_reference
from stepfuse.kernels.triton import (
    add_noise,
    denoise_step,
    group_norm_silu,
    group_norm_silu_plan,
    philox,
)
from stepfuse.kernels.triton.group_norm_silu_plan import plan

pytestmark = [
    needs_ptxsim,
    needs_compiler,
    pytest.mark.parametrize("arch", [80, 90], ids=lambda arch: f"sm_{arch}"),
]

# float32 arithmetic of a handful of operations on values around 1; one rounding of the result
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SEEDS = (-7, 2**40 + 3, 11, 0, 5)
SAMPLES = (0, 2**33 + 1, 5, 2**32 - 1, 9)


def poisoned(x: Tensor) -> Tensor:
    """A result tensor that shows what was not written."""
    return torch.full_like(x, math.nan)


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Within the named tolerance, which is both relative and absolute here."""
    tolerance = scale * TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def moved(launch: Any, name: str, kind: str) -> Any:
    """What one launch did to one argument; tensors that overlap are counted under both names."""
    for names, kinds in launch.stats.buffers.items():
        if name in names.split("/"):
            return kinds[kind]
    raise AssertionError(f"{name} was not touched")


def keys(count: int) -> tuple[Tensor, Tensor]:
    """Seeds and sample numbers with bits above the 32nd."""
    return torch.tensor(SEEDS[:count]), torch.tensor(SAMPLES[:count])


@triton.jit
def _words(out, seed, sample, timestep):  # type: ignore[no-untyped-def]
    block = tl.arange(0, 64)
    a, b, c, d = philox.words(tl.load(seed), tl.load(sample), tl.load(timestep), block)
    tl.store(out + 4 * block, a)
    tl.store(out + 4 * block + 1, b)
    tl.store(out + 4 * block + 2, c)
    tl.store(out + 4 * block + 3, d)


@pytest.mark.parametrize("index", range(3))
def test_philox_words_are_bit_equal(arch: int, index: int) -> None:
    seed, sample = (v[index : index + 1] for v in keys(3))
    timestep = torch.tensor([(0, 2**32 - 1, 999)[index]])
    out = torch.zeros(256, dtype=torch.uint32)
    with simulated(arch):
        _words[(1,)](out, seed, sample, timestep, num_warps=1, enable_fp_fusion=True)
    expected = philox_reference.integers(seed, sample, timestep, 256)[0]
    assert torch.equal(out.to(torch.int64), expected)


@triton.jit
def _pairs(first, second, a, b, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cosine, sine = philox.box_muller(tl.load(a + at), tl.load(b + at))
    tl.store(first + at, cosine)
    tl.store(second + at, sine)


def test_box_muller_at_its_edges(arch: int) -> None:
    """Every pair of words near 0, 2^31 and 2^32, where logarithm and quadrants change, and more."""
    near = torch.arange(-6, 6)
    edges = torch.cat([near + k * 2**29 for k in range(9)] + [near * 129 + 2**32]).remainder(2**32)
    edges = torch.cat([edges, 2 ** torch.arange(32)])[:152]
    grid = torch.cartesian_prod(edges, edges)
    words = torch.cat([grid, torch.randint(0, 2**32, (2**15 - len(grid), 2))])
    a, b = (v.to(torch.uint32) for v in words.unbind(1))
    results = [torch.full((2**15,), math.nan) for _ in range(2)]
    with simulated(arch):
        _pairs[(32,)](*results, a, b, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    # the definition, from the two roundings to float32 on
    u = words[:, 0].float() * 2.0**-32 + 2.0**-33
    v = (words[:, 1] - (words[:, 1] >> 31 << 32)).float() * 2.0**-31
    radius, angle = (-2 * u.double().log()).sqrt(), math.pi * v.double()
    for result, exact in zip(results, (radius * angle.cos(), radius * angle.sin()), strict=True):
        assert (result - exact).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (3, 3, 11, 13)], ids=["rows", "odd"])
def test_philox_normals(arch: int, shape: tuple[int, ...]) -> None:
    seed, sample = keys(shape[0])
    timestep = torch.tensor([2**32 - 1, 0, 77][: shape[0]])
    out, expected = poisoned(torch.empty(shape)), torch.empty(shape, dtype=torch.float64)
    philox_reference.fill(expected, seed, sample, timestep)
    with simulated(arch, racecheck=True) as launches:
        philox.fill(out, seed, sample, timestep)
    assert (out - expected).abs().max() < 1e-6
    assert moved(launches[0], "out", "st").bytes == out.nbytes


@pytest.mark.parametrize(
    ("shape", "dtype", "drawn", "target"),
    [
        ((3, 3, 7, 9), torch.bfloat16, False, "v"),
        ((2, 4, 12, 20), torch.float32, True, "epsilon"),
        ((5, 3, 19, 23), torch.float16, True, None),
    ],
    ids=["odd-given-v", "drawn-epsilon", "odd-drawn"],
)
def test_add_noise(
    arch: int, shape: tuple[int, ...], dtype: torch.dtype, drawn: bool, target: str | None
) -> None:
    x0 = torch.randn(shape).to(dtype)
    noise = None if drawn else torch.randn(shape).to(dtype)
    abar = torch.linspace(0.9999, 4e-5, 1000, dtype=torch.float64)
    t = torch.tensor([0, 999, 500, 3, 42][: shape[0]])
    seed, sample = keys(shape[0]) if drawn else (None, None)
    out, expected = poisoned(x0), poisoned(x0.double())
    extra, extra_expected = (poisoned(x0), poisoned(x0.double())) if target else (None, None)
    exact = None if noise is None else noise.double()
    add_noise_reference.run(
        x0.double(), exact, t, abar, seed, sample, expected, extra_expected, target == "v"
    )
    with simulated(arch, racecheck=True) as launches:
        add_noise.run(x0, noise, t, abar, seed, sample, out, extra, target == "v")
    close(out, expected)
    assert moved(launches[0], "x0", "ld").bytes == x0.nbytes
    assert moved(launches[0], "out", "st").bytes == x0.nbytes
    if noise is not None:
        assert moved(launches[0], "noise", "ld").bytes == x0.nbytes
    if extra is not None and extra_expected is not None:
        close(extra, extra_expected)
        assert moved(launches[0], "target", "st").bytes == x0.nbytes
    bulk = x0.nbytes * (2 + (not drawn) + (target is not None))
    every = launches[0].stats.buffers
    small = {"t", "alphas_cumprod", "seed", "sample"}
    counted = sum(a.bytes for names, k in every.items() if names not in small for a in k.values())
    assert counted == bulk, "no byte beyond the minimum"


@pytest.mark.parametrize(
    "case",
    ["odd", "drawn-guided-learned", "given-x0", "odd-drawn", "sigma-zero"],
)
def test_denoise_step(arch: int, case: str) -> None:
    shape = (3, 3, 13, 27) if case.startswith("odd") else (2, 3, 16, 24)
    dtype = torch.bfloat16 if case in ("odd", "drawn-guided-learned") else torch.float32
    count = shape[0]
    learned, guided = "learned" in case, "guided" in case
    x = torch.randn(shape).to(dtype)
    o = torch.randn(count, 6 if learned else 3, *shape[2:]).to(dtype)
    uncond = torch.randn_like(o) if guided else None
    noise = torch.randn_like(x) if "given" in case else None
    drawn = "drawn" in case or case == "sigma-zero"
    seed, sample = keys(count) if drawn else (None, None)
    table = torch.rand(4, 16) * 0.5 + 0.3
    table[:, 10] = torch.tensor([999.0, 749, 333, 0])
    if case == "sigma-zero":
        table[2, 5] = 0
    step = torch.tensor([2])
    expected = poisoned(x.double())
    x0, x0_expected = (poisoned(x), poisoned(x.double())) if "x0" in case else (None, None)
    exact = [None if v is None else v.double() for v in (uncond, noise)]
    denoise_reference.run(
        x.double(), o.double(), exact[0], table.double(), step, exact[1], seed, sample, learned,
        expected, x0_expected,
    )  # fmt: skip
    out = x.clone() if case == "drawn-guided-learned" else poisoned(x)
    start = out if case == "drawn-guided-learned" else x  # in place
    with simulated(arch, racecheck=True) as launches:
        denoise_step.run(start, o, uncond, table, step, noise, seed, sample, learned, out, x0)
    close(out, expected)
    assert moved(launches[0], "x", "ld").bytes == x.nbytes
    assert moved(launches[0], "out", "st").bytes == x.nbytes
    # of six channels, the three of an unused variance are not touched
    assert moved(launches[0], "model_output", "ld").bytes == o.nbytes
    if uncond is not None:
        assert moved(launches[0], "uncond", "ld").bytes == uncond.nbytes // 2
    if noise is not None:
        assert moved(launches[0], "noise", "ld").bytes == x.nbytes
    if x0 is not None and x0_expected is not None:
        close(x0, x0_expected)
        assert moved(launches[0], "x0_out", "st").bytes == x.nbytes
    if not case.startswith("odd"):
        assert moved(launches[0], "x", "ld").efficiency == 1.0
    rounds = sum(n for name, n in launches[0].stats.opcodes.items() if name.startswith("xor"))
    warps = launches[0].stats.threads // 32
    # a round has four exclusive ors (two of three operands), ten rounds make four normals
    assert (rounds >= 40 * warps) if "drawn" in case else (rounds < 10 * warps)


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (3, 3, 13, 27)], ids=["rows", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("weights", "write"),
    [((0.0, 0.0, 0.0), 0), ((0.7, 0.0, 0.0), 1), ((0.0, -1.3, 0.4), 1), ((1.0, 1.0, 1.0), -1)],
    ids=["write", "one", "two", "three"],
)
def test_denoise_step_with_a_history(
    arch: int,
    weights: tuple[float, float, float],
    write: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    """4 bytes an element for each slot that is read and for the one that is written, no more."""
    x, o = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    table, rows = torch.rand(4, 16) * 0.5 + 0.3, torch.rand(4, 8)
    rows[:, :3] = torch.tensor(weights)
    rows[:, 6] = write
    history = torch.randn(3, *shape)
    for slot, weight in enumerate(weights):
        if weight == 0:
            history[slot] = math.nan
    step, expected = torch.tensor([2]), poisoned(x.double())
    exact = history.double()
    denoise_reference.run(
        x.double(), o.double(), None, table.double(), step, None, None, None, False,
        expected, None, exact, rows.double(),
    )  # fmt: skip
    out = poisoned(x)
    with simulated(arch, racecheck=True) as launches:
        denoise_step.run(x, o, None, table, step, None, None, None, False, out, None, history, rows)
    close(out, expected)
    torch.testing.assert_close(history.double(), exact, rtol=4e-6, atol=4e-6, equal_nan=True)
    slot = 4 * x.numel()
    reads = sum(weight != 0 for weight in weights)
    traffic = launches[0].stats.buffers.get("history", {})
    assert sum(a.bytes for kind, a in traffic.items() if kind == "ld") == slot * reads
    assert sum(a.bytes for kind, a in traffic.items() if kind == "st") == slot * (write >= 0)
    assert moved(launches[0], "x", "ld").bytes == x.nbytes
    assert moved(launches[0], "out", "st").bytes == x.nbytes


@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "last", "modulated", "silu"),
    [
        ((2, 32, 8, 8), 8, torch.bfloat16, False, True, True),
        ((2, 24, 8, 12), 4, torch.float32, True, True, False),
        ((2, 12, 7, 9), 3, torch.float16, False, False, True),
        ((2, 40), 5, torch.float32, False, True, True),
        ((1, 6, 72, 80), 1, torch.bfloat16, False, True, True),
        ((1, 40, 32, 36), 2, torch.bfloat16, True, True, True),
        ((1, 3, 149, 153), 1, torch.float32, False, False, False),
    ],
    ids=["one", "one-last", "odd", "pixel", "split", "split-last", "split-odd"],
)
def test_group_norm_silu(
    arch: int,
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    last: bool,
    modulated: bool,
    silu: bool,
) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    x = (torch.randn(shape) * 2 + 3).to(dtype).contiguous(memory_format=layout)
    count, channels = shape[:2]
    weight, bias = torch.randn(channels), torch.randn(channels)
    scale, shift = torch.randn(count, 2 * channels).chunk(2, dim=1) if modulated else (None, None)
    add = torch.randn(count, channels) if modulated else None
    arguments = [None if v is None else v.double() for v in (scale, shift, add)]
    expected = group_norm_reference.formula(
        x.double(), weight.double(), bias.double(), groups, 1e-5, *arguments, silu
    )
    out = poisoned(x)
    with simulated(arch, racecheck=True) as launches:
        group_norm_silu.run(x, weight, bias, groups, 1e-5, scale, shift, add, silu, out)
    close(out, expected, scale=8)  # gain, modulation and rstd multiply the rounding of a value of 5
    one_pass = plan(x, groups).one_pass
    assert [launch.name for launch in launches] == ["_statistics"] * (not one_pass) + ["_apply"]
    for launch in launches:
        read = moved(launch, "x", "ld")
        assert read.bytes == x.nbytes, "each element is read once a pass"
        # rows of an odd size start anywhere in a sector; lanes still read side by side
        assert read.efficiency == 1.0 if math.prod(shape[2:]) % 16 == 0 else read.efficiency > 0.6
    assert moved(launches[-1], "out", "st").bytes == x.nbytes
    if not one_pass:
        partials = moved(launches[0], "partials", "st").bytes
        assert partials == 3 * 4 * count * groups * plan(x, groups).parts
        assert partials < x.nbytes / 50


def test_group_norm_silu_in_place_and_repeatable(arch: int) -> None:
    x = torch.randn(1, 6, 72, 80).bfloat16()
    first, second = x.clone(), x.clone()
    with simulated(arch, racecheck=True):
        for result in (first, second):
            group_norm_silu.run(result, None, None, 1, 1e-5, None, None, None, True, result)
    assert torch.equal(first, second)
    exact = [v.double() for v in (x,)]
    expected = group_norm_reference.formula(*exact, None, None, 1, 1e-5, None, None, None, True)
    close(first, expected)


@pytest.mark.parametrize(("channels", "last"), [(20, False), (8, True)], ids=["first", "last"])
def test_statistics_over_runs_of_tiles(
    arch: int, channels: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few partials of many tiles, the last run cut short, as an image of 1000 x 1000 has them."""
    for name, value in (("SPLIT", 1024), ("PARTIALS", 20), ("PROGRAMS", 1)):
        monkeypatch.setattr(group_norm_silu_plan, name, value)
    group_norm_silu_plan.plan_of.cache_clear()
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(1, channels, 50, 46) + torch.linspace(-3, 9, 50)[:, None]
    x = x.contiguous(memory_format=layout)
    cut = group_norm_silu_plan.plan(x, 1)
    out = poisoned(x)
    with simulated(arch, racecheck=True):
        group_norm_silu.run(x, None, None, 1, 1e-5, None, None, None, True, out)
    monkeypatch.undo()
    group_norm_silu_plan.plan_of.cache_clear()
    assert cut.tiles_per_part > 1
    assert cut.tiles_per_part * cut.pixel_parts > cut.tiles or not last
    close(out, group_norm_reference.formula(x.double(), None, None, 1, 1e-5, *[None] * 3, True))


def test_group_norm_silu_survives_a_large_mean(arch: int) -> None:
    x = torch.randn(1, 8, 16, 16) + 1e4
    out = poisoned(x)
    with simulated(arch):
        group_norm_silu.run(x, None, None, 2, 1e-5, None, None, None, False, out)
    expected = group_norm_reference.formula(
        x.double(), None, None, 2, 1e-5, None, None, None, False
    )
    # float32 holds a mean of 1e4 to 5e-4, and the results have a standard deviation of 1
    assert (out - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("shape", "last"),
    [((2, 16, 6, 8), False), ((2, 12, 24, 36), True)],
    ids=["one", "split-last"],
)
def test_group_norm_silu_backward(arch: int, shape: tuple[int, ...], last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    x, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    count, channels = shape[:2]
    weight, bias = torch.randn(channels), torch.randn(channels)
    scale, shift, add = (torch.randn(count, channels) for _ in range(3))
    row, vector = torch.empty(count, channels), torch.empty(channels)
    results = [poisoned(v) for v in (x, vector, vector, row, row, row)]
    expected = [torch.empty(v.shape, dtype=torch.float64) for v in results]
    exact = [v.double() for v in (weight, bias, scale, shift, add)]
    group_norm_reference.backward(
        grad.double().contiguous(), x.double().contiguous(), *exact[:2], 2, 1e-5, *exact[2:], True,
        *expected,
    )  # fmt: skip
    with simulated(arch, racecheck=True) as launches:
        group_norm_silu.backward(grad, x, weight, bias, 2, 1e-5, scale, shift, add, True, *results)
    assert [launch.name for launch in launches] == (
        ["_statistics", "_sums", "_finish", "_dx", "_parameters"] if last
        else ["_sums", "_parameters"]
    )  # fmt: skip
    for actual, exact_result in zip(results, expected, strict=True):
        # sums over hundreds of terms of size 1 to 10
        error = (actual - exact_result).abs().max() / exact_result.abs().max().clamp(min=1)
        assert error < 2e-5
