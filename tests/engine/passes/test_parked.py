"""Weights that leave memory for a file: everything still works, and the memory is given back."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.passes.networks import ONEDNN_DTYPES, distance
from torch import Tensor, nn

from stepfuse.engine.optimize import Optimized, WeightsChanged, optimize
from stepfuse.engine.passes import parked
from stepfuse.engine.passes.parked import Files, Parking
from stepfuse.engine.unet import UNet, UNetConfig

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
REORDERED = 1e-5  # float32 sums in another order, through three layers
PAGE = 4096


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parked, "FEW", 1)


def network() -> tuple[nn.Module, Tensor]:
    """Three convolutions with norms between them, and an image of an odd shape."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
    model = nn.Sequential(layers[0], nn.GroupNorm(4, 64), nn.SiLU(), *layers[1:]).eval()
    return model, torch.randn(2, 64, 7, 5)


def weights(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() == 4]


def in_file(model: nn.Module) -> list[bool]:
    files = Files()
    return [weight in files for weight in weights(model)]


def resident(weight: Tensor) -> int:
    """Bytes of the mapping around ``weight`` that are in memory."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            here = start <= weight.data_ptr() < end
        elif here and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("it is in no mapping")


@linux
@pytest.mark.parametrize("dtype", ONEDNN_DTYPES)
@torch.no_grad()
def test_weights_leave_memory_and_can_be_read(dtype: torch.dtype | None) -> None:
    model, x = network()
    values = [w.clone() for w in weights(model)]
    state = {name: (v.clone(), v.stride()) for name, v in model.state_dict().items()}
    kept = optimize(model, (x,), dtype, weights="kept")
    assert in_file(model) == [False] * 3
    expected = kept(x)
    del kept
    fast = optimize(model, (x,), dtype)
    assert in_file(model) == [True] * 3
    megabytes = sum(v.nbytes for v in values) / 2**20
    assert f", {megabytes:.1f} MB in a file" in fast.explain()
    # one page of each is looked at in every evaluation
    assert resident(weights(model)[0]) == 3 * PAGE
    assert distance(fast(x), expected) < (REORDERED if dtype is None else 1e-2)
    assert resident(weights(model)[0]) == 3 * PAGE
    for weight, value in zip(weights(model), values, strict=True):
        assert torch.equal(weight, value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name][0])
        assert tensor.stride() == state[name][1]
    assert resident(weights(model)[0]) >= sum(v.nbytes for v in values), "they were read"


@linux
@torch.no_grad()
def test_what_was_read_back_leaves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    fast = optimize(model, (x,))
    advise, left = parked._madvise(), []
    assert advise is not None

    def watched(start: int, nbytes: int, advice: int) -> int:
        left.append((start, nbytes))
        return advise(start, nbytes, advice)

    monkeypatch.setattr(parked, "_madvise", lambda: watched)
    fast.refresh()
    assert sorted(left) == sorted((w.data_ptr(), w.nbytes) for w in weights(model))
    left.clear()
    assert fast(x[:1, :, :, :4]).isfinite().all()
    assert len(left) == 3, "the weights were read for this shape"


@linux
@torch.no_grad()
def test_what_a_model_can_do_it_still_can(tmp_path: Path) -> None:
    model, x = network()
    expected = model(x)
    fast = optimize(model, (x,))
    assert distance(model(x), expected) < REORDERED
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert in_file(twin) == [False] * 3
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["0.weight"], model[0].weight)
    assert distance(copy.deepcopy(fast)(x), expected) < REORDERED
    assert fast(x[:1, :, :4]).shape == (1, 64, 4, 5), "another shape packs them once more"
    half = optimize(model, (x,), torch.bfloat16)
    assert distance(half(x), expected) < 2e-2
    assert in_file(model) == [True] * 3
    with torch.enable_grad():
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    changed = model(x)
    with pytest.raises(WeightsChanged):
        fast(x)
    fast.refresh()
    assert distance(fast(x), changed) < REORDERED


@linux
@torch.no_grad()
def test_weights_of_the_timestep_rest_beside_the_table() -> None:
    torch.manual_seed(0)
    config = UNetConfig(base_channels=32, channel_multipliers=(1, 2), blocks_per_level=1)
    model = UNet(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 8, 6), torch.tensor([3, 5])
    exact = model(x, t)
    kept = optimize(model, (x, t), timesteps=[3, 5], weights="kept")
    expected, unknown = kept(x, t), kept(x, t + 700)
    del kept
    fast = optimize(model, (x, t), timesteps=[3, 5])
    files = Files()
    embedding = [p for name, p in model.named_parameters() if p.dim() == 2 and p.nbytes >= PAGE]
    assert len(embedding) > 3
    assert all(p in files for p in embedding)
    for _ in range(2):
        assert distance(fast(x, t), expected) < REORDERED
        assert distance(fast(x, t + 700), unknown) < REORDERED
        fast.refresh()
    embedding[0].mul_(2)
    with pytest.raises(WeightsChanged):
        fast(x, t)
    fast.refresh()
    assert distance(fast(x, t), model(x, t)) < 1e-4
    assert distance(model(x, t), exact) > 1e-3


REPEATABLE: list[Callable[[nn.Module], Any]] = [
    lambda model: model.load_state_dict(network_of(7).state_dict()),
    lambda model: model.load_state_dict(network_of(7).state_dict(), assign=True),
    lambda model: [w.mul_(-2) for w in weights(model)],
    lambda model: [w.data.mul_(-2) for w in weights(model)],
]
CHANGES: list[list[Callable[[nn.Module], Any]]] = [
    *([change, change] for change in REPEATABLE),
    [lambda model: model.to(memory_format=torch.channels_last), REPEATABLE[2]],
    [lambda model: model.share_memory(), REPEATABLE[3]],
]


def network_of(seed: int) -> nn.Module:
    model, _ = network()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@linux
@pytest.mark.parametrize("changes", CHANGES)
@torch.no_grad()
def test_changes_are_noticed_and_followed(changes: list[Callable[[nn.Module], Any]]) -> None:
    model, x = network()
    fast = optimize(model, (x,))
    for change in changes:
        change(model)
        with pytest.raises(WeightsChanged):
            fast(x)
        fast.refresh()
        assert distance(fast(x), model(x)) < REORDERED


@linux
@torch.no_grad()
def test_what_was_written_survives_leaving_memory() -> None:
    model, x = network()
    fast = optimize(model, (x,))
    weight = weights(model)[1]
    weight[:32] = 3.0
    after = weight.clone()
    for _ in range(3):
        fast.refresh()
        assert torch.equal(weight, after)


@linux
@torch.no_grad()
def test_a_tensor_that_others_hold_stays_and_is_followed() -> None:
    model, x = network()
    state = model.state_dict()
    fast = optimize(model, (x,))
    assert in_file(model) == [False] * 3
    assert "3 weights in memory are held by others too" in fast.explain()
    state["0.weight"].mul_(-1.5)
    fast.refresh()
    assert distance(fast(x), model(x)) < REORDERED
    del state
    fast.refresh()
    assert in_file(model) == [True] * 3
    assert "held by others" not in fast.explain()
    later = model.state_dict()  # of weights that are parked: they stay where they are
    later["0.weight"].mul_(-1.5)
    fast.refresh()
    assert torch.equal(later["0.weight"], model[0].weight)
    assert distance(fast(x), model(x)) < REORDERED


@linux
@torch.no_grad()
def test_a_weight_with_two_places_is_moved_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    model, x = Tied().eval(), torch.randn(1, 64, 4, 6)
    expected = model(x)
    fast = optimize(model, (x,))
    assert model.a.weight is model.b.weight
    assert model.a.weight in Files()
    assert distance(fast(x), expected) < REORDERED
    model.b.weight.mul_(2)
    with pytest.raises(WeightsChanged):
        fast(x)


@linux
@torch.no_grad()
def test_strides_and_offsets_are_kept() -> None:
    flat = torch.randn(2 * 64 * 64 * 9 + 5)
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))).eval()
    strided = flat[5:].view(2, 64, 9, 64)[1].transpose(1, 2).unflatten(2, (3, 3))
    model[0].weight = nn.Parameter(strided.mul_(0.05))
    model[1].to(memory_format=torch.channels_last)
    del flat, strided
    before = [(w.clone(), w.stride(), w.storage_offset()) for w in weights(model)]
    x = torch.randn(1, 64, 5, 7)
    expected = model(x)
    fast = optimize(model, (x,))
    assert in_file(model) == [True] * 2
    for weight, (value, stride, offset) in zip(weights(model), before, strict=True):
        assert (weight.stride(), weight.storage_offset()) == (stride, offset)
        assert torch.equal(weight, value)
    assert distance(fast(x), expected) < REORDERED


@linux
@torch.no_grad()
def test_weights_of_a_checkpoint_stay_in_its_file(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Conv2d(256, 256, 3, padding=1) for _ in range(3))).eval()
    x = torch.randn(1, 256, 4, 3)
    expected = model(x)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are still to be written do not leave at once
    content = path.read_bytes()
    model.load_state_dict(load_file(path), assign=True)
    addresses = [w.data_ptr() for w in weights(model)]
    assert in_file(model) == [True] * 3
    fast = optimize(model, (x,))
    assert [w.data_ptr() for w in weights(model)] == addresses
    assert resident(weights(model)[0]) < len(content) / 2, "they were read and have left"
    assert distance(fast(x), expected) < REORDERED
    model[0].weight.mul_(2)
    fast.refresh()
    assert distance(fast(x), model(x)) < REORDERED
    assert path.read_bytes() == content


@linux
def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = network()
        expected = model(x)
        fast = optimize(model, (x,))
        assert in_file(model) == [True] * 3
        assert distance(fast(x), expected) < REORDERED


@linux
@torch.no_grad()
def test_a_child_process_writes_to_weights_of_its_own() -> None:
    model, x = network()
    optimize(model, (x,))
    before = weights(model)[0].clone()
    child = os.fork()
    if child == 0:
        weights(model)[0].detach().numpy()[:] = 1.0
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(weights(model)[0], before)


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
    assert isinstance(optimize(model, (x,), weights="kept"), Optimized)
