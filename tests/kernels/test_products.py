"""What the C++ module's products can do, and what is left where there is no such module."""

from __future__ import annotations

import subprocess
import sys

import torch
from op_cases import needs_module

from stepfuse.kernels.products import vector_channels, whole_vectors, why_not


@needs_module
def test_they_are_for_float32_and_where_there_are_dot_products_bfloat16() -> None:
    from stepfuse.kernels.cpp.module import native

    assert why_not(torch.float32) == ""
    expected = "" if native.bfloat16_products else "no dot products of bfloat16"
    assert why_not(torch.bfloat16) == expected
    for dtype in (torch.float16, torch.float64):
        assert why_not(dtype) == f"not for {dtype}"


@needs_module
def test_channels_in_whole_vectors() -> None:
    wide = vector_channels()
    assert wide in (8, 16, 32)
    assert whole_vectors(wide, 3 * wide)
    assert not whole_vectors(wide, wide + 1)
    assert not whole_vectors(1)


WITHOUT = """
import sys
sys.modules["stepfuse.kernels.cpp.module"] = None  # what makes an import fail
import pytest, torch
from stepfuse.kernels.attention import attention
from stepfuse.kernels.concatenate import concatenate
from stepfuse.kernels.convolve import convolve
from stepfuse.kernels.filters import filters, fits
from stepfuse.kernels.products import vector_channels, whole_vectors, why_not
from stepfuse.kernels.reference.attention import formula

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    assert why_not(dtype) == "no C++ module"
    q = torch.randn(2, 3, 5, 8).to(dtype)
    assert torch.equal(attention(q, q, q, 0.5), formula(q, q, q, 0.5).to(dtype))
    images = [torch.randn(2, c, 3, 5).to(dtype) for c in (3, 2)]
    assert torch.equal(concatenate(images), torch.cat(images, 1))
assert vector_channels() == 0
assert not whole_vectors(16)
assert not fits((1, 32, 4, 4), 32, "direct")
with pytest.raises(ValueError, match="filters cannot be packed here: no C.. module"):
    filters(torch.randn(32, 32, 3, 3), "direct", torch.float32)
with pytest.raises(ValueError, match="torch.float32 cannot run here: no C.. module"):
    convolve(torch.randn(1, 32, 4, 4), torch.randn(2, 1, 1, 32, 16, 1))

from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.networks.unet import UNet, UNetConfig
config = UNetConfig(base_channels=16, channel_multipliers=(1, 2), blocks_per_level=1, norm_groups=4)
model, inputs = UNet(config).eval(), (torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))
with torch.no_grad():
    fast = optimize(model, inputs)
    assert torch.allclose(fast(*inputs), model(*inputs), atol=1e-5)
print(fast.explain())
"""


def test_without_a_module_the_reference_serves_and_passes_say_why_they_do_nothing() -> None:
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    lines = {line.split()[0]: line for line in found.stdout.splitlines() if line.strip()}
    assert "left: no C++ module" in lines["convolution_forms"]
    assert "left: no C++ module for it" in lines["concatenate"]


def test_nothing_of_the_module_is_loaded_before_it_runs() -> None:
    code = (
        "import sys, stepfuse.kernels.attention, stepfuse.kernels.concatenate,"
        " stepfuse.kernels.convolve, stepfuse.kernels.direct;"
        "print([n for n in sys.modules if n.startswith(('stepfuse.kernels.cpp', 'stepfuse._cpu'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
