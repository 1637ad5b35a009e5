"""Filters that are laid out channels-last where they lie: what changes, what does not, and when."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.engine.compile.fake_cuda import DEVICE, fake_cuda, module_on_cuda
from tests.engine.compile.networks import distance, own, stable_diffusion
from torch import Tensor, nn

from stepfuse.engine.compile.network import CompiledNetwork, Settings
from stepfuse.engine.compile.optimize import Optimized, WeightsChanged, optimize
from stepfuse.engine.compile.passes import channels_last
from stepfuse.engine.compile.weights.watched import turn_back

REORDERED = 1e-5  # float32 sums in another order, through some twenty layers
# passes that pack filters, which then lie in no layout at all
PACKING = ("prepack_convolutions", "convolution_forms", "upsampled_convolutions")
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(channels_last, "turns_filters", lambda device: True)
    with torch.no_grad():
        yield


def compiled(model: nn.Module, inputs: Any, **options: Any) -> Optimized:
    return optimize(model, inputs, without=PACKING, **options)


def wide(model: nn.Module) -> list[Tensor]:
    """The filters whose two layouts differ."""
    return [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]


def turned(model: nn.Module) -> int:
    return sum(w.is_contiguous(memory_format=LAST) for w in wide(model))


def test_filters_are_turned_where_they_lie() -> None:
    model, inputs = own()
    plain, expected = copy.deepcopy(model), model(*inputs)
    parameters = list(model.parameters())
    fast = compiled(model, inputs)
    assert turned(plain) == 0
    assert turned(model) == len(wide(model)) > 5
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for (name, a), (other, b) in zip(
        model.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert (name, a.shape, a.dtype) == (other, b.shape, b.dtype)
        assert torch.equal(a, b)
    assert distance(fast(*inputs), expected) < REORDERED
    assert distance(model(*inputs), expected) < REORDERED
    (network,) = fast.networks
    assert isinstance(network, CompiledNetwork)
    at = {w.data_ptr() for w in wide(model)}
    assert {network.constants[name].data_ptr() for name in network.turned} == at
    held = sum(w.nbytes for w in wide(model)) / 2**20
    assert f"; {len(at)} filters, {held:.1f} MB, turned where they lie" in fast.explain()


def test_nothing_is_held_twice() -> None:
    model, inputs = own()
    kept = compiled(copy.deepcopy(model), inputs, weights="kept").networks[0].nbytes()
    parked = compiled(model, inputs).networks[0].nbytes()
    assert kept - parked == sum(w.nbytes for w in wide(model))


def test_kept_weights_stay_as_they_are() -> None:
    model, inputs = own()
    fast = compiled(model, inputs, weights="kept")
    assert turned(model) == 0
    assert "turned" not in fast.explain()
    assert distance(fast(*inputs), model(*inputs)) < REORDERED


def _state_dict(model: nn.Module) -> Any:
    return [value for name, value in model.state_dict().items() if "conv" in name]


def _views(model: nn.Module) -> Any:
    return [w[:1] for w in wide(model)]


@pytest.mark.parametrize("hold", [_state_dict, _views])
def test_memory_that_others_hold_stays_theirs_too(hold: Any) -> None:
    model, inputs = own()
    addresses = [w.data_ptr() for w in wide(model)]
    held = hold(model)
    fast = compiled(model, inputs)
    shared = {v.untyped_storage().data_ptr() for v in held}
    same = [w.data_ptr() in shared for w in wide(model)]
    stayed = [w.data_ptr() == a for w, a in zip(wide(model), addresses, strict=True)]
    assert same == stayed
    assert turned(model) == stayed.count(False)
    assert f"{same.count(True)} copied: its memory is held by others too" in fast.explain()
    assert distance(fast(*inputs), model(*inputs)) < REORDERED
    wide(model)[0].mul_(2)
    with pytest.raises(WeightsChanged):
        fast(*inputs)
    fast.refresh()
    assert distance(fast(*inputs), model(*inputs)) < REORDERED
    assert torch.equal(held[0], wide(model)[0][: len(held[0])])


def test_two_parameters_of_one_memory_stay_one() -> None:
    model, inputs = own()
    first, second = [w for w in wide(model) if w.shape == (16, 16, 3, 3)][:2]
    second.data = first.data
    fast = compiled(model, inputs)
    assert first.data_ptr() == second.data_ptr()
    assert not first.is_contiguous(memory_format=LAST)
    assert distance(fast(*inputs), model(*inputs)) < REORDERED


def test_a_second_shape_reads_what_the_first_has_turned() -> None:
    model, (x, t) = own()
    fast = compiled(model, (x, t))
    addresses = [w.data_ptr() for w in wide(model)]
    assert distance(fast(x[:1], t[:1]), model(x[:1], t[:1])) < REORDERED
    assert len(fast.networks) == 2
    assert [w.data_ptr() for w in wide(model)] == addresses
    assert distance(fast(x, t), model(x, t)) < REORDERED


def test_networks_that_were_there_before_see_no_change() -> None:
    model, inputs = own()
    # one that has made other constants of the filters, and holds no tensor of them
    before = optimize(model, inputs, torch.bfloat16, without=PACKING, weights="parked")
    expected = before(*inputs)
    fast = compiled(model, inputs)
    assert turned(model) == len(wide(model))
    assert torch.equal(before(*inputs), expected)
    assert distance(fast(*inputs), model(*inputs)) < REORDERED


def _copied(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()})


def _assigned(model: nn.Module) -> None:
    changed = {k: (v * 1.25).contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict(changed, assign=True)


def _by_data(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data = (weight.data * 1.25).contiguous()


@pytest.mark.parametrize("change", [_copied, _assigned, _by_data])
def test_changed_weights_are_read_at_a_refresh(change: Any) -> None:
    model, inputs = own()
    fast = compiled(model, inputs)
    before = fast(*inputs)
    change(model)
    with pytest.raises(WeightsChanged):
        fast(*inputs)
    fast.refresh()
    assert distance(fast(*inputs), model(*inputs)) < REORDERED
    assert distance(fast(*inputs), before) > 0.1
    assert turned(model) == len(wide(model))


def test_a_refresh_never_writes_to_memory_of_the_user() -> None:
    model, inputs = own()
    fast = compiled(model, inputs)
    (network,) = fast.networks
    mine = [w.detach() for w in wide(model)]
    values = [w.clone() for w in mine]
    others = [(w.data * 2).contiguous() for w in wide(model)]
    for weight, other in zip(wide(model), others, strict=True):
        weight.data = other
    moves = network.moves
    fast.refresh()
    assert all(torch.equal(a, b) for a, b in zip(mine, values, strict=True))
    assert all(w.data_ptr() == o.data_ptr() for w, o in zip(wide(model), others, strict=True))
    assert network.moves > moves, "what was captured reads the old memory"
    assert f"{len(mine)} copied: its memory is held by others too" in fast.explain()
    assert distance(fast(*inputs), model(*inputs)) < REORDERED


def test_it_is_undone_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = own()
    strides, values = [w.stride() for w in wide(model)], [w.clone() for w in wide(model)]
    seen = []

    def fail(network: CompiledNetwork, leaves: Any) -> Any:
        seen.append(turned(model))
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(CompiledNetwork, "__call__", fail)
    fast = compiled(model, inputs)
    assert max(seen) == len(strides)
    assert [w.stride() for w in wide(model)] == strides
    assert all(torch.equal(w, v) for w, v in zip(wide(model), values, strict=True))
    assert "no graph" in fast.explain()
    assert distance(fast(*inputs), model(*inputs)) < REORDERED


def test_a_model_is_turned_back_once_nobody_reads_it_so() -> None:
    model, inputs = own()
    strides, values = [w.stride() for w in wide(model)], [w.clone() for w in wide(model)]
    fast = compiled(model, inputs)
    expected = fast(*inputs)
    turn_back(model)
    assert turned(model) == len(strides), "a network reads them"
    assert torch.equal(fast(*inputs), expected)
    del fast
    gc.collect()
    turn_back(model)
    assert [w.stride() for w in wide(model)] == strides
    assert all(torch.equal(w, v) for w, v in zip(wide(model), values, strict=True))


def test_while_other_threads_run_nothing_moves() -> None:
    model, inputs = own()
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="serving")
    thread.start()
    try:
        fast = compiled(model, inputs)
    finally:
        done.set()
        thread.join()
    assert turned(model) == 0
    assert f"{len(wide(model))} copied: thread 'serving' may be reading it" in fast.explain()
    assert distance(fast(*inputs), model(*inputs)) < REORDERED


def test_training_files_and_copies_work_as_before() -> None:
    model, inputs = own()
    expected = model(*inputs)
    compiled(model, inputs)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, _ = own()
    fresh.load_state_dict(torch.load(file))
    assert turned(fresh) == 0
    for other in (fresh, copy.deepcopy(model)):
        assert distance(other(*inputs), expected) < REORDERED
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(*inputs).square().mean().backward()
            optimizer.step()
    assert distance(model(*inputs), expected) > 0


def test_memory_that_processes_share_is_not_replaced() -> None:
    model, inputs = own()
    model.share_memory()
    fast = compiled(model, inputs)
    assert turned(model) == 0
    assert f"{len(wide(model))} copied: its memory is shared by processes" in fast.explain()
    assert all(w.is_shared() for w in wide(model))


def test_stable_diffusion_on_cuda_holds_its_filters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.UntypedStorage, "is_shared", lambda _: True)  # as CUDA says
    half, results = torch.float16, {}
    with fake_cuda():
        x = torch.empty(2, 4, 64, 64, dtype=half, device=DEVICE)
        t = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        text = {"encoder_hidden_states": torch.empty(2, 77, 768, dtype=half, device=DEVICE)}
        for holding in ("kept", "parked"):
            model = module_on_cuda(stable_diffusion, half)
            before = sum(p.untyped_storage().nbytes() for p in model.parameters())
            network = CompiledNetwork(model, (x, t), text, Settings(weights=holding))  # type: ignore[arg-type]
            constants = {v.untyped_storage()._cdata: v for v in network.constants.values()}
            for p in model.parameters():
                constants.pop(p.untyped_storage()._cdata, None)
            results[holding] = sum(v.untyped_storage().nbytes() for v in constants.values())
            assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == before
            assert network([x, t, *text.values()]).sample.shape == x.shape
            filters = sum(w.nbytes for w in wide(model))
            assert turned(model) == (len(wide(model)) if holding == "parked" else 0)
    assert results["kept"] - results["parked"] == filters
    assert filters > 100e6
    assert results["parked"] < 1e6
