"""What the ops refuse: the message names the value received and what is accepted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from stepfuse.kernels import checks, philox
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.group_norm_silu import group_norm_silu

INTS = torch.zeros(3, dtype=torch.int64)
CPU = torch.device("cpu")

DENOISE = [
    ({"x": torch.zeros(2, 3).long()}, TypeError, "float32, .*got torch.int64"),
    ({"x": torch.zeros(4)}, ValueError, r"\[N, C, ...\].*got \(4,\)"),
    ({"x": torch.zeros(0, 3)}, ValueError, r"got \(0, 3\)"),
    ({"model_output": torch.zeros(2, 5, 4)}, ValueError, r"\(2, 6, 4\); got \(2, 5, 4\)"),
    ({"model_output": torch.zeros(3, 3, 4)}, ValueError, r"\(2, 3, 4\); got \(3, 3, 4\)"),
    ({"model_output": torch.zeros(2)}, ValueError, r"\(2, 3, 4\); got \(2,\)"),
    ({"model_output": torch.zeros(2, 3, 4).int()}, TypeError, "got torch.int32"),
    ({"uncond_output": torch.zeros(1, 3, 4)}, ValueError, r"uncond.*got \(1, 3, 4\)"),
    ({"noise": torch.zeros(2, 3, 5)}, ValueError, r"noise.*got \(2, 3, 5\)"),
    ({"noise": torch.zeros(2, 3, 4), "seed": 1}, ValueError, "noise or seed, not both"),
    ({"learned_variance": True}, ValueError, "6 output channels; got 3"),
    ({"table": torch.zeros(5, 15)}, ValueError, r"\[S, 16\]; got \(5, 15\)"),
    ({"table": torch.zeros(5, 16, device="meta")}, ValueError, "on cpu like x; got meta"),
    ({"step": torch.zeros(1, device="meta").long()}, ValueError, "on cpu like x; got meta"),
    ({"noise": torch.zeros(2, 3, 4, device="meta")}, ValueError, "on cpu .*; got meta"),
    ({"step": 5}, IndexError, r"0 \.\. 4; got 5"),
    ({"step": -1}, IndexError, r"0 \.\. 4; got -1"),
    ({"step": torch.tensor(5), "backend": "reference"}, IndexError, r"step .*0 \.\. 4; got 5"),
    ({"step": torch.tensor([-1])}, IndexError, r"step .*0 \.\. 4; got -1"),
    ({"step": INTS}, ValueError, r"int64 \[1\]; got .*\(3,\)"),
    ({"step": torch.zeros(1)}, ValueError, "got torch.float32"),
    ({"seed": 2**64}, ValueError, f"64 bits; got {2**64}"),
    ({"seed": -(2**63) - 1}, ValueError, f"64 bits; got -{2**63 + 1}"),
    ({"seed": 1.5}, TypeError, "int64 tensor; got float"),
    ({"seed": torch.zeros(2)}, TypeError, "int64 tensor; got torch.float32"),
    ({"seed": INTS}, ValueError, r"one per sample \(2\); got \(3,\)"),
    ({"seed": 1, "sample": INTS}, ValueError, r"\(2,\); got \(3,\)"),
    ({"out": torch.zeros(2, 3, 5)}, ValueError, r"out.*got \(2, 3, 5\)"),
    ({"out": torch.zeros(2, 3, 4).half()}, TypeError, "torch.float32.*got torch.float16"),
    ({"inplace": True, "out": torch.zeros(2, 3, 4)}, ValueError, "not both"),
    ({"backend": "tpu"}, ValueError, "reference, cpp, triton; got 'tpu'"),
    ({"x": torch.zeros(2, 3, 4).cfloat()}, TypeError, "x must be one of .*got torch.complex64"),
    ({"model_output": torch.zeros(2, 3, 4).cfloat()}, TypeError, "got torch.complex64"),
    ({"noise": torch.zeros(2, 3, 4).cfloat()}, TypeError, "noise .*got torch.complex64"),
    ({"table": torch.zeros(5, 16).cfloat()}, TypeError, "table .*got torch.complex64"),
    ({"table": torch.zeros(5, 16).int()}, TypeError, "table .*got torch.int32"),
    ({"step": True}, TypeError, "step must be an int or an int64 tensor; got bool True"),
    ({"step": 1.0}, TypeError, r"step must be an int or an int64 tensor; got float 1\.0"),
    ({"step": np.int64(5)}, IndexError, r"0 \.\. 4; got 5"),
    ({"seed": True}, TypeError, "seed must be an int .*got bool True"),
    ({"seed": np.array([1, 2])}, TypeError, "seed must be an int .*got ndarray"),
    ({"seed": 1, "sample": np.float64(1)}, TypeError, "sample must be an int .*got float64"),
    ({"out": torch._neg_view(torch.zeros(2, 3, 4))}, ValueError, "out must not be a negated view"),
    ({"x0_out": torch._neg_view(torch.zeros(2, 3, 4))}, ValueError, "x0_out must not be a neg"),
    ({"x": torch._neg_view(torch.zeros(2, 3, 4)), "inplace": True}, ValueError, "a negated view"),
]

NOISE = [
    ({"x0": torch.zeros(2, 3).bool()}, TypeError, "float32, .*got torch.bool"),
    ({"x0": torch.zeros(0, 3)}, ValueError, r"got shape \(0, 3\)"),
    ({"noise": None}, ValueError, "needs a seed"),
    ({"seed": 3}, ValueError, "either noise or seed"),
    ({"noise": torch.zeros(2, 3)}, ValueError, r"\(2, 3, 4\); got \(2, 3\)"),
    ({"t": 10}, IndexError, r"0 \.\. 9; got 10"),
    ({"t": -1}, IndexError, r"0 \.\. 9; got -1"),
    ({"t": torch.tensor([3, 10])}, IndexError, r"0 \.\. 9; got 3 \.\. 10"),
    ({"t": torch.tensor([-2, 3])}, IndexError, r"0 \.\. 9; got -2 \.\. 3"),
    (
        {"x0": torch.zeros(99, 1), "noise": torch.zeros(99, 1), "t": torch.arange(99)},
        IndexError,
        r"got 0 \.\. 98",
    ),
    ({"t": INTS}, ValueError, r"one per sample \(2\); got \(3,\)"),
    ({"t": torch.zeros(2)}, TypeError, "t must be an int or an int64 tensor; got torch.float32"),
    ({"t": 0.5}, TypeError, "got float"),
    ({"target": "x0"}, ValueError, "v_prediction or None; got 'x0'"),
    ({"target_out": torch.zeros(2, 3, 4)}, ValueError, "target=None"),
    ({"inplace": True, "out": torch.zeros(2, 3, 4)}, ValueError, "not both"),
    ({"out": torch.zeros(2, 3)}, ValueError, r"out.*got \(2, 3\)"),
    ({"backend": "numpy"}, ValueError, "got 'numpy'"),
    ({"x0": torch.zeros(2, 3, 4).cdouble()}, TypeError, "x0 .*got torch.complex128"),
    ({"noise": torch.zeros(2, 3, 4).cfloat()}, TypeError, "noise .*got torch.complex64"),
    ({"alphas_cumprod": torch.ones(10).cfloat()}, TypeError, "alphas_cumprod .*torch.complex64"),
    ({"alphas_cumprod": torch.ones(10).long()}, TypeError, "alphas_cumprod .*got torch.int64"),
    ({"alphas_cumprod": torch.ones(10, 1)}, ValueError, r"alphas_cumprod .*got shape \(10, 1\)"),
    ({"t": True}, TypeError, "t must be an int or an int64 tensor; got bool True"),
    ({"t": np.int64(10)}, IndexError, r"0 \.\. 9; got 10"),
    ({"t": np.int32(-1)}, IndexError, r"0 \.\. 9; got -1"),
    ({"out": torch._neg_view(torch.zeros(2, 3, 4))}, ValueError, "out must not be a negated view"),
]

NORM = [
    ({"x": torch.zeros(2, 6, 4).int()}, TypeError, "got torch.int32"),
    ({"x": torch.zeros(6)}, ValueError, r"\[N, C, ...\]; got \(6,\)"),
    ({"groups": 4}, ValueError, "divide the 6 channels; got 4"),
    ({"groups": 0}, ValueError, "got 0"),
    ({"eps": 0.0}, ValueError, r"positive; got 0\.0"),
    ({"eps": float("nan")}, ValueError, "got nan"),
    ({"act": "gelu"}, ValueError, "silu, none; got 'gelu'"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight.*\(6,\); got \(5,\)"),
    ({"bias": torch.zeros(1, 6)}, ValueError, r"bias.*got \(1, 6\)"),
    ({"scale": torch.zeros(6)}, ValueError, r"scale.*\(2, 6\); got \(6,\)"),
    ({"shift": torch.zeros(1, 6)}, ValueError, r"shift.*got \(1, 6\)"),
    ({"add": torch.zeros(2, 6, 1)}, ValueError, r"add.*got \(2, 6, 1\)"),
    ({"add": torch.zeros(2, 6).int()}, TypeError, "add.*got torch.int32"),
    ({"out": torch.zeros(2, 6, 5)}, ValueError, r"out.*got \(2, 6, 5\)"),
    ({"out": torch.zeros(2, 6, 4).double()}, TypeError, "got torch.float64"),
    ({"backend": "tpu"}, ValueError, "got 'tpu'"),
    ({"x": torch.zeros(2, 6, 4).cfloat()}, TypeError, "x .*got torch.complex64"),
    ({"weight": torch.zeros(6).cfloat()}, TypeError, "weight .*got torch.complex64"),
    ({"groups": 2.0}, TypeError, r"groups must be an int; got float 2\.0"),
    ({"groups": True}, TypeError, "groups must be an int; got bool True"),
    ({"groups": "2"}, TypeError, "groups must be an int; got str '2'"),
    ({"groups": torch.tensor(2)}, TypeError, "groups must be an int; got Tensor"),
    ({"eps": 1e-50}, ValueError, r"eps must be at least 1\.18e-38 in torch.float32.*got 1e-50"),
    ({"eps": 1e-40}, ValueError, "eps must be at least .*got 1e-40"),
    ({"eps": 1e39}, ValueError, r"eps must be finite, and at most 3\.4e\+38; got 1e\+39"),
    ({"eps": math.inf}, ValueError, "eps must be finite.*got inf"),
    ({"eps": -1e-5}, ValueError, "eps .*got -1e-05"),
    ({"eps": "1e-5"}, TypeError, "eps must be an int or a float; got str '1e-5'"),
    ({"eps": None}, TypeError, "eps must be an int or a float; got None"),
    ({"eps": torch.tensor(1e-5)}, TypeError, "eps must be an int or a float; got Tensor"),
    ({"out": torch._neg_view(torch.zeros(2, 6, 4))}, ValueError, "out must not be a negated view"),
]


@pytest.mark.parametrize(("changes", "error", "message"), DENOISE)
def test_denoise_step(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.zeros(2, 3, 4)
    given = {"x": x, "model_output": x, "table": torch.zeros(5, 16), "step": 3} | changes
    with pytest.raises(error, match=message):
        denoise_step(**given)


@pytest.mark.parametrize(("changes", "error", "message"), NOISE)
def test_add_noise(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.zeros(2, 3, 4)
    given = {"x0": x, "noise": x, "t": 3, "alphas_cumprod": torch.linspace(1, 0, 10)} | changes
    with pytest.raises(error, match=message):
        add_noise(**given)


@pytest.mark.parametrize(("changes", "error", "message"), NORM)
def test_group_norm_silu(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": torch.zeros(2, 6, 4), "weight": None, "bias": None, "groups": 2} | changes
    with pytest.raises(error, match=message):
        group_norm_silu(**given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step": -1}, ValueError, r"0 \.\. 2\^32-1; got -1"),
        ({"step": 2**32}, ValueError, f"got {2**32}"),
        ({"seed": 2**64}, ValueError, f"seed must fit in 64 bits; got {2**64}"),
        ({"sample": True}, TypeError, "sample must be an int or an int64 tensor; got bool"),
        ({"dtype": torch.int32}, TypeError, "float32, .*got torch.int32"),
        ({"out": torch.zeros(3)}, ValueError, r"out.*\(2, 2\); got \(3,\)"),
        ({"step": True}, TypeError, "step must be an int or an int64 tensor; got bool True"),
        ({"step": np.int64(-1)}, ValueError, r"0 \.\. 2\^32-1; got -1"),
        ({"step": torch.tensor(-1)}, ValueError, r"step must be in 0 \.\. 4294967295; got -1"),
        ({"step": torch.tensor(2**32)}, ValueError, f"got {2**32} "),
        ({"seed": 1.0}, TypeError, r"seed must be an int or an int64 tensor; got float 1\.0"),
        ({"out": torch._neg_view(torch.zeros(2, 2))}, ValueError, "must not be a negated view"),
    ],
)
def test_philox_normal(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        philox.normal(**({"seed": 0, "sample": 0, "step": 0, "shape": (2, 2)} | changes))


def test_integers_of_numpy_are_integers() -> None:
    x, ramp = torch.randn(2, 6, 4), torch.linspace(1, 0, 10)
    for kind in (np.int64, np.uint8):
        five = kind(5)
        row = torch.linspace(0.1, 1.6, 16).expand(6, 16)
        seeded = {"seed": kind(3), "sample": kind(7)}
        assert torch.equal(
            denoise_step(x, x, row, five, **seeded), denoise_step(x, x, row, 5, seed=3, sample=7)
        )
        assert torch.equal(add_noise(x, x, five, ramp), add_noise(x, x, 5, ramp))
        assert torch.equal(
            group_norm_silu(x, None, None, kind(2), np.float32(0.5)),
            group_norm_silu(x, None, None, 2, 0.5),
        )
        drawn = philox.normal(five, five, five, (2,))
        assert torch.equal(drawn, philox.normal(5, 5, 5, (2,)))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_constant_groups_stay_finite_with_the_smallest_eps(backend: str) -> None:
    x = torch.full((2, 6, 4), 3.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if backend == "cpp" and dtype is torch.float64:
            continue
        eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).tiny
        y = group_norm_silu(x.to(dtype), None, None, 2, eps, backend=backend)
        assert torch.equal(y, torch.zeros_like(y))


def test_ready_indices_come_back_without_a_copy() -> None:
    indices = torch.arange(3)
    assert checks.per_sample("seed", indices, 3, CPU) is indices
    assert checks.sample_indices(indices, 3, CPU) is indices


@pytest.mark.parametrize("value", [torch.tensor(7), torch.tensor([7]), torch.tensor([7]).int(), 7])
def test_one_value_is_repeated(value: int | torch.Tensor) -> None:
    found = checks.per_sample("seed", value, 3, CPU)
    assert found.dtype == torch.int64
    assert found.is_contiguous()
    assert found.tolist() == [7, 7, 7]


def test_sample_numbers_wrap_like_64_bit_words() -> None:
    top, bottom = 2**63 - 1, -(2**63)
    assert checks.sample_indices(top - 1, 3, CPU).tolist() == [top - 1, top, bottom]
    assert checks.sample_indices(2**64 - 1, 3, CPU).tolist() == [-1, 0, 1]
    assert checks.sample_indices(5, 3, CPU).tolist() == [5, 6, 7]
