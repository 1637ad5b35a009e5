"""Weights that leave memory for a file: everything still works, and the memory is given back."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.compile.networks import ONEDNN_DTYPES, distance
from tests.engine.compile.weights.parking import (
    PAGE,
    REORDERED,
    in_file,
    linux,
    network,
    resident,
    weights,
)
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.engine.compile.optimize import WeightsChanged, optimize
from stepfuse.engine.compile.weights import parked
from stepfuse.engine.compile.weights.parked import Files
from stepfuse.engine.networks.unet import UNet, UNetConfig


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parked, "FEW", 1)


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
        try:
            weights(model)[0].detach().numpy()[:] = 1.0
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, "it has written"
    assert torch.equal(weights(model)[0], before)


@linux
def test_another_sampler_of_the_model_goes_on() -> None:
    digits = sf.load("digits")
    settings: dict[str, Any] = {"steps": 2, "graph": "step"}
    arguments: dict[str, Any] = {"condition": {"labels": torch.tensor([3])}, "seed": 1}
    plain = sf.Sampler(digits.model, digits.schedule, **settings)
    expected = plain.sample((1, 1, 32, 32), **arguments)
    fast = sf.Sampler(digits.model, digits.schedule, optimize=True, **settings)
    fast.sample((1, 1, 32, 32), **arguments)
    assert any(p in Files() for p in digits.model.parameters())
    assert torch.equal(plain.sample((1, 1, 32, 32), **arguments), expected)
    assert plain.stats()["captures"] == 1
    with torch.no_grad():
        next(iter(digits.model.parameters())).data = torch.zeros(1)
    # the step is recorded anew, with the weight as it is now
    with pytest.raises(RuntimeError, match="at least three dimensions"):
        plain.sample((1, 1, 32, 32), **arguments)


@linux
@torch.no_grad()
def test_nothing_moves_while_another_thread_may_be_reading() -> None:
    model, x = network()
    expected, addresses = model(x), [w.data_ptr() for w in weights(model)]
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="reader")
    thread.start()
    try:
        fast = optimize(model, (x,))
        assert [w.data_ptr() for w in weights(model)] == addresses
        assert in_file(model) == [False] * 3
        assert "they stay in memory: thread 'reader' may be reading them" in fast.explain()
        assert distance(fast(x), expected) < REORDERED
    finally:
        over.set()
        thread.join()
    fast.refresh()
    assert in_file(model) == [True] * 3
    assert distance(fast(x), expected) < REORDERED
