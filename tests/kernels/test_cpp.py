"""The C++ modules: which one is loaded, what they share with torch, and that they stay in bounds.

What the operations compute is tested with every other backend in test_<op>.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("stepfuse.kernels.cpp.module", reason="the C++ module was not built")

from stepfuse.kernels.cpp import denoise_step, group_norm_silu, module, philox
from stepfuse.kernels.reference import philox as reference
from stepfuse.kernels.step_row import COLUMNS, Column

CSRC = Path(__file__).parents[2] / "csrc"
SUPPORTED = module.native.supported()
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_loads_the_best_module_that_is_built_and_supported() -> None:
    assert module.ISAS.index(module.isa) >= module.ISAS.index(SUPPORTED[0])
    if not os.environ.get("STEPFUSE_ISA"):
        assert module.isa == SUPPORTED[0]


RESULTS = """
import sys, torch
from stepfuse.kernels.cpp import denoise_step, group_norm_silu, module, philox
generator = torch.Generator().manual_seed(0)
x = torch.randn(2, 12, 7, 5, generator=generator)
y, z = torch.empty_like(x), torch.empty(2, 1001)
group_norm_silu.run(x, None, None, 3, 1e-5, None, None, None, True, y)
index = torch.tensor([3, 2**40])
philox.fill(z, index, index, index)
half = {}
for dtype in (torch.bfloat16, torch.float16):
    half[dtype] = torch.empty(2, 1001, dtype=dtype)
    philox.fill(half[dtype], index, index, index)
torch.save((module.isa, y, z, half), sys.argv[1] if len(sys.argv) > 1 else "PATH")
"""


@pytest.mark.parametrize("isa", SUPPORTED)
def test_every_instruction_set_agrees(isa: str, tmp_path: Path) -> None:
    path = tmp_path / isa
    done = run_python(RESULTS.replace("PATH", str(path)), STEPFUSE_ISA=isa)
    assert done.returncode == 0, done.stderr
    loaded, y, z, half = torch.load(path)
    assert loaded == isa
    x = torch.randn(2, 12, 7, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 3))
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6)  # float32 arithmetic
    index = torch.tensor([3, 2**40])
    normals = reference.normal(index, index, index, 1001)
    assert (z.double() - normals).abs().max() < 1e-6  # the accuracy DESIGN.md promises
    for dtype, values in half.items():
        # one unit in the last place: the float32 normal may lie across a rounding boundary
        torch.testing.assert_close(
            values.double(), normals, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_an_unknown_instruction_set_is_an_error_that_names_the_accepted_ones(isa: str) -> None:
    done = run_python("import stepfuse.kernels.cpp.module", STEPFUSE_ISA=isa)
    assert done.returncode != 0
    assert f"ValueError: STEPFUSE_ISA must be one of {', '.join(SUPPORTED)}" in done.stderr
    assert f"got '{isa}'" in done.stderr


SHARED_POOL = """
import os, re, torch
from stepfuse.kernels.cpp import group_norm_silu, module
assert module.native.shares_torch_threads
x = torch.randn(1, 8, 512, 512)
out = torch.empty_like(x)
def tasks():
    return len(os.listdir("/proc/self/task"))
def ours():
    group_norm_silu.run(x, None, None, 8, 1e-5, None, None, None, True, out)
before = tasks()
torch.set_num_threads(1); ours(); assert tasks() == before, "one thread asked for"
torch.set_num_threads(3); ours(); assert tasks() == before + 2, "three threads asked for"
torch.sin(x); assert tasks() == before + 2, "torch has a pool of its own"
maps = open("/proc/self/maps").read()
print(len(set(re.findall(r"\\S*/lib(?:gomp|iomp5|omp)\\S*", maps))))
"""


@linux_only
def test_shares_the_one_openmp_runtime_and_pool_of_torch() -> None:
    done = run_python(SHARED_POOL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


def test_another_python_thread_respects_set_num_threads() -> None:
    code = """
import os, threading, torch
from stepfuse.kernels.cpp import group_norm_silu
torch.set_num_threads(1)
x = torch.randn(1, 8, 512, 512)
out = torch.empty_like(x)
before = len(os.listdir("/proc/self/task"))
after = []
def work():
    group_norm_silu.run(x, None, None, 8, 1e-5, None, None, None, True, out)
    after.append(len(os.listdir("/proc/self/task")))
thread = threading.Thread(target=work)
thread.start(); thread.join()
assert after == [before + 1], (before, after)
"""
    if sys.platform != "linux":
        pytest.skip("needs Linux: reads /proc")
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((1, 6, 129, 127), 1), ((3, 64, 33, 31), 2)])
def test_bits_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, ...], groups: int, channels_last: bool
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 3
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            out = torch.full_like(x, float("nan"))
            group_norm_silu.run(x, None, None, groups, 1e-5, None, None, None, True, out)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [1, 3, 15, 16, 17, 63, 64, 65, 129])
def test_nothing_outside_the_output_is_written(elements: int, dtype: torch.dtype) -> None:
    def guarded() -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.full((2 * elements + 128,), 7.0, dtype=dtype)
        return whole, whole[64 : 64 + 2 * elements].view(2, 1, elements)

    index = torch.tensor([1, 2])
    table = torch.zeros(1, COLUMNS)
    table[0, Column.CLIP] = table[0, Column.SIGMA] = table[0, Column.C_X] = 1
    x = torch.randn(2, 1, elements).to(dtype)
    results = [guarded() for _ in range(3)]
    philox.fill(results[0][1], index, index, index)
    denoise_step.run(
        x, x, None, table, index[:1] - 1, None, index, index, False, results[1][1], None
    )
    group_norm_silu.run(x, None, None, 1, 1e-5, None, None, None, True, results[2][1])
    for whole, inside in results:
        assert (whole[:64] == 7).all()
        assert (whole[64 + 2 * elements :] == 7).all()
        assert not (inside == 7).any()


def test_integers_are_those_of_the_reference() -> None:
    seed = torch.tensor([0, -1, 2**62 + 12345])
    sample = torch.tensor([0, 2**40 + 3, -1])
    timestep = torch.tensor([0, 999, 2**32 - 1])
    expected = reference.integers(seed, sample, timestep, 1003)
    assert torch.equal(philox.integers(seed, sample, timestep, 1003), expected)


def test_a_step_outside_the_table_is_an_index_error() -> None:
    x = torch.zeros(1, 1, 4)
    with pytest.raises(IndexError, match=r"step must be in 0 \.\. 0; got 3"):
        denoise_step.run(
            x, x, None, torch.zeros(1, COLUMNS), torch.tensor([3]), None, None, None, False, x, None
        )


def test_the_sources_know_nothing_of_torch() -> None:
    for source in (*CSRC.glob("*.cpp"), *CSRC.glob("*.h")):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source
