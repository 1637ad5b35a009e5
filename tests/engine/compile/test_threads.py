"""The number of threads changes after a network was compiled: another number, another network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.engine.compile.networks import small

import stepfuse as sf
from stepfuse.engine.compile.optimize import Optimized, optimize

REORDERED = 1e-5  # float32 sums in another order, through some twenty layers


@pytest.fixture
def fast() -> Optimized:
    model, inputs = small()
    torch.set_num_threads(2)
    return optimize(model, inputs)


@torch.no_grad()
def test_each_number_of_threads_has_its_network(fast: Optimized) -> None:
    _, inputs = small()
    two = fast(*inputs)
    torch.set_num_threads(1)
    one = fast(*inputs)
    assert len(fast.networks) == 2
    assert (one - two).norm() <= REORDERED * two.norm()
    torch.set_num_threads(2)
    assert torch.equal(fast(*inputs), two)
    torch.set_num_threads(1)
    assert torch.equal(fast(*inputs), one)
    assert len(fast.networks) == 2, "both are kept"


@torch.no_grad()
def test_released_weights_go_on_in_threads_they_were_not_packed_for() -> None:
    model, inputs = small()
    torch.set_num_threads(2)
    fast = optimize(model, inputs, weights="released")
    two = fast(*inputs)
    torch.set_num_threads(1)
    assert (fast(*inputs) - two).norm() <= REORDERED * two.norm()
    assert len(fast.networks) == 1


def test_a_captured_step_is_captured_again() -> None:
    digits = sf.load("digits")
    sampler = sf.Sampler(digits.model, digits.schedule, steps=3, optimize=True)
    labels = {"labels": torch.tensor([3])}
    torch.set_num_threads(2)
    two = sampler.sample((1, *digits.sample_shape), condition=labels)
    torch.set_num_threads(1)
    one = sampler.sample((1, *digits.sample_shape), condition=labels)
    assert (one - two).abs().max() < 1e-3
    assert sampler.stats()["captures"] == 2
    assert torch.equal(sampler.sample((1, *digits.sample_shape), condition=labels), one)
    assert sampler.stats()["captures"] == 2


_ASKED = """
import torch, stepfuse as sf
from stepfuse.engine.compile.runs import has_instructions
from stepfuse.kernels.products import why_not
print(has_instructions(torch.device("cpu"), torch.bfloat16), why_not(torch.bfloat16) or "products")
d = sf.load("digits")
x, t = torch.zeros(1, 1, 32, 32), torch.tensor([5])
fast = sf.optimize(d.model, (x, t, {"labels": t}), torch.bfloat16)
exact = sf.optimize(d.model, (x, t, {"labels": t}))
print(torch.equal(fast(x, t, labels=t), exact(x, t, labels=t)))
print(next(line for line in fast.explain().splitlines() if "lower_precision" in line))
"""


def test_without_bfloat16_products_the_network_computes_in_float32() -> None:
    """With the instruction set that most processors have, whatever this one has."""
    ended = subprocess.run(
        [sys.executable, "-c", _ASKED],
        env={**os.environ, "STEPFUSE_ISA": "avx2"},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    if "STEPFUSE_ISA must be one of" in ended.stderr:
        pytest.skip("needs a processor with AVX2")
    asked, equal, explained = ended.stdout.splitlines()
    assert asked == "False no dot products of bfloat16", ended.stderr
    assert equal == "True"
    assert "the network runs in float32" in explained
    assert "no instructions for torch.bfloat16" in explained
