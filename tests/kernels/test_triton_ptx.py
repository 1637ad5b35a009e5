"""Every kernel the engine launches, compiled for four architectures, and the machine code read.

No GPU is needed: the launchers run on meta tensors and Triton compiles for a target. See
`stepfuse.kernels.triton.variants` for the list.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from triton_modes import needs_compiler

from stepfuse.bench.roofline import CARDS, static_table, traffic
from stepfuse.kernels.triton import flat, group_norm_silu_plan, variants
from stepfuse.kernels.triton.ahead import compiling
from stepfuse.kernels.triton.variants import BULK, Kernel

pytestmark = needs_compiler
ARCHITECTURES = (80, 90, 100, 120)
# 64 registers keep half of the threads a multiprocessor can hold; 128 are what 512 threads can have
# at most, so that a tile in registers always finds room for one program
REGISTERS = {"add_noise": 64, "denoise_step": 64, "philox": 64, "group_norm_silu": 128}
# samples of an odd size, of which every element runs its own ten rounds of Philox
REGISTERS_ODD = 96
# four loads of float32 beside those of 16 bits, in flight at once
REGISTERS_HISTORY = 96
SHARED = 16 * 1024


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[int, Future[list[Kernel]]]]:
    """All kernels of each architecture; two processes share the work."""
    workers = min(2, len(os.sched_getaffinity(0)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield {arch: pool.submit(variants.compiled, arch) for arch in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def kernels(
    request: pytest.FixtureRequest, compilations: dict[int, Future[list[Kernel]]]
) -> list[Kernel]:
    """What was compiled for one architecture."""
    return compilations[request.param].result()


def test_nothing_is_left_out(kernels: list[Kernel]) -> None:
    assert {k.variant for k in kernels} == {v.name for v in variants.variants()}
    launched = {k.kernel for k in kernels}
    assert launched >= {"kernel", "fill", "statistics", "apply", "sums", "finish", "dx"}
    assert all(k.programs > 0 for k in kernels)


def test_bulk_accesses_are_128_bit(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        tail = {2, 4} if "odd size" in kernel.variant else set()
        for name, kinds in kernel.accesses.items():
            for kind, widths in kinds.items() if name in BULK else ():
                assert 16 in widths, (kernel.variant, kernel.kernel, name, kind, widths)
                assert widths - {16} <= tail, (kernel.variant, kernel.kernel, name, kind, widths)


def test_each_kernel_touches_what_its_variant_needs(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        read = {n for n, kinds in kernel.accesses.items() if "ld" in kinds} & BULK
        written = {n for n, kinds in kernel.accesses.items() if "st" in kinds} & BULK
        op = kernel.variant.split(":")[0]
        if op == "denoise_step":
            expected = {"x", "model_output"}
            expected |= {"uncond"} if "guidance" in kernel.variant else set()
            expected |= {"noise"} if "given" in kernel.variant else set()
            memory = {"history"} if "history" in kernel.variant else set()
            assert read == expected | memory, kernel.variant
            x0_out = {"x0_out"} if "x0 output" in kernel.variant else set()
            assert written == {"out"} | x0_out | memory
            assert kernel.accesses["step"] == {"ld": {8}}, "the row is chosen in device memory"
            assert kernel.accesses["table"] == {"ld": {4}}
        elif op == "add_noise":
            assert read == {"x0"} | ({"noise"} if "given" in kernel.variant else set())
            assert written == {"out"} | ({"target"} if "target" in kernel.variant else set())
        elif kernel.kernel == "apply":
            assert (read, written) == ({"x"}, {"out"})


def test_no_spill_no_local_memory_no_library_call(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.resources.stack == 0, kernel
        assert kernel.resources.local == 0, kernel
        assert kernel.suspicious == (), kernel


def test_registers_and_shared_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        op = kernel.variant.split(":")[0]
        most = REGISTERS_ODD if "drawn, odd" in kernel.variant else REGISTERS[op]
        most = REGISTERS_HISTORY if "history of 3" in kernel.variant else most
        assert kernel.resources.registers <= most, kernel
        assert kernel.resources.registers * kernel.warps * 32 <= 65536, kernel
        assert kernel.resources.shared <= SHARED, kernel


@pytest.mark.parametrize(
    ("line", "unwanted"),
    [
        (".local .align 8 .b8 __local_depot0[40];", True),
        ("@%p1 ld.local.b32 %r1, [%rd1];", True),
        ("call.uni (retval0), __nv_sinf, (param0);", True),
        ("sqrt.rn.f64 %rd1, %rd2;", True),
        ("@%p1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];", False),
        ("sqrt.rn.f32 %r1, %r2; // local const call", False),
    ],
)
def test_the_search_for_slow_code_finds_it(line: str, unwanted: bool) -> None:
    assert bool(variants.UNWANTED.search(line)) == unwanted


def test_parameters_are_not_loaded_per_element(kernels: list[Kernel]) -> None:
    """One-pass GroupNorm, channels-first: a load of weight for every element is 8 times that of x.

    Counted in the code of one thread: it loads fewer words of all parameters than elements of x.
    """
    with compiling(80) as log:
        x = torch.empty(64, 128, 32, 32, dtype=torch.bfloat16, device="meta")
        w = torch.empty(128, device="meta")
        variants.group_norm_silu.run(x, w, w, 32, 1e-5, None, None, None, True, x)
    plan = group_norm_silu_plan.plan(x, 32)
    elements = plan.rows * plan.cols // (plan.warps * 32)
    loads = log[0].ptx.count("ld.global.b32 ") + log[0].ptx.count("ld.global.v2.b32 ")
    assert 0 < loads < elements // 2


def test_one_kernel_serves_every_step() -> None:
    """Nothing that changes from step to step is an argument by value."""
    table = torch.empty(50, 16, device="meta")
    x = torch.empty(4, 3, 32, 32, device="meta")
    n = torch.empty(4, dtype=torch.int64, device="meta")
    with compiling(90) as log:
        variants.denoise_step.run(x, x, None, table, n[:1], None, n, n, False, x, None)
    values = {k: v for k, v in log[0].arguments.items() if isinstance(v, (int, float))}
    assert set(values) <= {
        "rows", "length", "total", "blocks", "pixels", "channels",
        "K", "DRAWN", "LEARNED", "WIDE", "BLOCK", "ROWS", "LAST",
    }  # fmt: skip
    assert (values["length"], values["total"], values["BLOCK"]) == (3072, 12288, flat.BLOCK)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("groups", [1, 2, 32])
@pytest.mark.parametrize("samples", [1, 16])
def test_every_shape_has_a_plan(samples: int, groups: int, last: bool) -> None:
    """Tiles cover all channels and pixels, fit into registers, and split ones fill a card."""
    for group, pixels in itertools.product(
        (1, 3, 4, 6, 10, 30, 64, 127), (1, 4, 49, 256, 1024, 4096, 65536, 10**6)
    ):
        p = group_norm_silu_plan.plan_of(samples, group * groups, pixels, groups, last)
        where = (samples, group, groups, pixels, last, p)
        assert p.cols >= p.block, where
        assert p.rows * p.tiles >= pixels, where
        assert (p.tiles - 1) * p.rows < pixels, where
        if p.channel_parts > 1:
            assert p.block * p.channel_parts >= group > p.block * (p.channel_parts - 1), where
        else:
            assert p.block % group == 0 or p.block == group * groups, where
            assert p.block * p.blocks >= group * groups, where
        wide = p.cols > group_norm_silu_plan.NARROW or last
        limit = group_norm_silu_plan.ONE_PASS * (1 if wide else 2)
        assert p.rows * p.cols <= (limit if p.one_pass else group_norm_silu_plan.SPLIT), where
        assert p.rows * p.cols <= 64 * 32 * p.warps, where
        assert p.tiles_per_part * p.pixel_parts >= p.tiles, where
        assert p.held * p.parts <= 2 * group_norm_silu_plan.PARTIALS, where
        size = samples * group * groups * pixels
        programs = samples * p.blocks * p.pixel_parts
        if not p.one_pass and size >= 2**22:
            # channels-last groups of one or two channels share a tile, and its partials, with many
            assert programs >= (128 if p.held <= 8 else 16), where


def test_static_table(compilations: dict[int, Future[list[Kernel]]]) -> None:
    rows = static_table((90,), {90: compilations[90].result()})
    listed = variants.variants()
    assert [row.variant for row in rows] == [v.name for v in listed]
    for row, variant in zip(rows, listed, strict=True):
        assert row.vector_bits == 128
        assert not row.spilled
        assert row.kernels
        assert len(row.registers) == len(row.kernels)
        # bytes over GB/s is nanoseconds
        assert row.microseconds == pytest.approx(variant.bytes / CARDS[90][1] / 1000)
        if row.unfused_bytes_per_element is not None:
            assert row.bytes_per_element <= row.unfused_bytes_per_element
    step = next(row for row in rows if row.variant.startswith("denoise_step: no noise"))
    assert step.bytes_per_element == 6.0, "two bfloat16 read and one written"


def test_traffic_counts_operators_and_no_views() -> None:
    x = torch.empty(10, 10, device="meta")
    assert traffic(lambda: x + x.t()) == 3 * 400, "a view is its own tensor, and moves nothing"
    assert traffic(lambda: x.view(100)) == 0
    assert traffic(lambda: torch.randn_like(x)) == 400


def test_the_interpreter_variable_runs_the_kernels() -> None:
    """TRITON_INTERPRET=1 has to be set before Triton is imported, hence a process of its own."""
    code = (
        "import torch\n"
        "from stepfuse.kernels import philox\n"
        "a = philox.normal(5, torch.tensor([1, 2]), 3, (4, 6), backend='triton')\n"
        "b = philox.normal(5, torch.tensor([1, 2]), 3, (4, 6), backend='reference')\n"
        "print(float((a - b).abs().max()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6
