"""Every kernel the engine launches, compiled for four architectures, and the machine code read.

No GPU is needed: the launchers run on meta tensors and Triton compiles for a target. See
`stepfuse.kernels.triton.variants` for the list.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from stepfuse.kernels.triton import flat, group_norm_silu_plan, variants
from stepfuse.kernels.triton.ahead import compiling
from stepfuse.kernels.triton.variants import BULK, Kernel

ARCHITECTURES = (80, 90, 100, 120)
# 64 registers keep half of the threads a multiprocessor can hold; 128 are what 512 threads can have
# at most, so that a tile in registers always finds room for one program
REGISTERS = {"add_noise": 64, "denoise_step": 64, "philox": 64, "group_norm_silu": 128}
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
            assert read == expected, kernel.variant
            assert written == {"out"} | ({"x0_out"} if "x0 output" in kernel.variant else set())
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
        assert kernel.resources.registers <= REGISTERS[op], kernel
        assert kernel.resources.registers * kernel.warps * 32 <= 65536, kernel
        assert kernel.resources.shared <= SHARED, kernel


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
        "length", "total", "blocks", "pixels", "channels",
        "DRAWN", "LEARNED", "WIDE", "BLOCK", "ROWS", "LAST",
    }  # fmt: skip
    assert (values["length"], values["total"], values["BLOCK"]) == (3072, 12288, flat.BLOCK)
