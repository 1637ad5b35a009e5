"""The file that weights are parked in: no room, a failing disk, its end, what never goes in."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import distance
from tests.engine.compile.weights.parking import (
    REORDERED,
    in_file,
    linux,
    network,
    weights,
)
from torch import nn

from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.weights import parked
from stepfuse.engine.compile.weights.parked import Parking


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parked, "FEW", 1)


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NO_ROOM: list[tuple[str, Callable[[pytest.MonkeyPatch], Any]]] = [
    ("No space left on device", lambda patch: patch.setattr(os, "posix_fallocate", full)),
    (
        "MB free",
        lambda patch: patch.setattr(os, "statvfs", lambda _: os.statvfs_result([1] * 10)),
    ),
    ("is memory itself", lambda patch: patch.setattr(parked, "_is_memory", lambda _: True)),
    ("this is win32", lambda patch: patch.setattr(parked.sys, "platform", "win32")),
]


@linux
@pytest.mark.parametrize(("reason", "refuse"), NO_ROOM)
@torch.no_grad()
def test_without_room_they_stay_in_memory(
    reason: str, refuse: Callable[[pytest.MonkeyPatch], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network()
    expected = model(x)
    refuse(monkeypatch)
    descriptors = len(os.listdir("/proc/self/fd"))
    fast = optimize(model, (x,))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert in_file(model) == [False] * 3
    assert reason in fast.explain()
    assert distance(fast(x), expected) < REORDERED


@linux
@torch.no_grad()
def test_a_disk_that_fails_while_they_move_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    expected = model(x)
    values = [w.clone() for w in weights(model)]
    write, count = os.pwrite, 0

    def until_it_is_full(*args: Any) -> int:
        nonlocal count
        count += 1
        return write(*args) if count == 1 else full()

    monkeypatch.setattr(os, "pwrite", until_it_is_full)
    fast = optimize(model, (x,))
    assert sorted(in_file(model)) == [False, False, True]
    assert "the others stay in memory: [Errno 28] No space left on device" in fast.explain()
    for weight, value in zip(weights(model), values, strict=True):
        assert torch.equal(weight, value)
    assert distance(fast(x), expected) < REORDERED


@linux
def test_memory_file_systems_are_recognised() -> None:
    assert parked._is_memory("/dev/shm")
    assert not parked._is_memory("/proc")


@linux
@torch.no_grad()
def test_the_file_ends_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, x = network()
    optimize(model, (x,))
    assert list(tmp_path.iterdir()) == [], "it has no name"

    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    assert mapped()
    del model
    assert not mapped()


@linux
@torch.no_grad()
def test_few_weights_are_not_worth_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    monkeypatch.setattr(parked, "FEW", 1 << 20)
    fast = optimize(model, (x,))
    assert in_file(model) == [False] * 3
    assert fast.explain().splitlines()[-1].endswith("MB")


def test_tensors_elsewhere_are_left() -> None:
    odd = [
        torch.empty(5000, device="meta"),
        torch.empty(0),
        torch.zeros(100_000).to_sparse(),
        nn.Parameter(torch.zeros(10)),
        torch.zeros(5000).share_memory_(),
        torch.zeros(5000, dtype=torch.cfloat).conj(),
    ]
    parking = Parking(odd)
    for tensor in odd:
        parking.park(tensor)
    parking.close(odd)
    assert parking.note == ""


def test_how_weights_are_held_is_checked() -> None:
    model, x = network()
    with pytest.raises(ValueError, match="weights must be one of parked, kept, released; got 'no'"):
        optimize(model, (x,), weights="no")  # type: ignore[arg-type]
