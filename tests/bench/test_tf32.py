"""TF32 is off for every candidate on a GPU, and what it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stepfuse.bench import tf32
from stepfuse.bench.tf32 import settings, tf32_off

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = settings()
    yield
    for place, name, value in before:
        setattr(place, name, value)


def values() -> list[Any]:
    return [value for _, _, value in settings()]


def switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_the_cpu_touches_nothing() -> None:
    torch.backends.cudnn.allow_tf32 = True
    before = values()
    with tf32_off(torch.device("cpu")):
        assert values() == before


@pytest.mark.parametrize("matmul", [False, True])
@pytest.mark.parametrize("convolution", [False, True])
def test_both_are_off_and_come_back(matmul: bool, convolution: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolution
    before = values()
    with tf32_off(CUDA):
        assert switches() == (False, False)
    assert values() == before
    assert switches() == (matmul, convolution)


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch before 2.9 has the switches alone"
)
@pytest.mark.parametrize("name", ["ieee", "tf32"])
def test_names_that_somebody_has_set_come_back(name: str) -> None:
    """With them the switches cannot be read, and inductor reads the names."""
    named: list[Any] = tf32._named()
    for place in named:
        place.fp32_precision = name
    with tf32_off(CUDA):
        assert switches() == (False, False)
        assert all(place.fp32_precision in ("ieee", "none") for place in named)
    assert [place.fp32_precision for place in named] == [name] * len(named)


def test_they_come_back_after_an_error() -> None:
    torch.backends.cudnn.allow_tf32 = True
    before = values()
    with pytest.raises(KeyboardInterrupt), tf32_off(CUDA):
        raise KeyboardInterrupt
    assert values() == before
