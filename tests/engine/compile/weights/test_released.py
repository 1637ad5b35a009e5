"""Weights that are freed after packing: what still runs, what is said about the rest."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import ONEDNN_DTYPES, distance, only, own, small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepfuse import Sampler, Schedule
from stepfuse.engine.compile.network import CompiledNetwork
from stepfuse.engine.compile.optimize import Optimized, optimize
from stepfuse.engine.compile.weights.released import WeightsReleased

# float32 sums in another order, through some twenty layers
REORDERED = 1e-5
BFLOAT16 = 2e-2  # eight layers, each rounds its weights and image to 8 bits


def released(dtype: torch.dtype | None = None) -> tuple[nn.Module, Optimized, tuple[Any, ...]]:
    model, inputs = small()
    return model, optimize(model, inputs, dtype, weights="released"), inputs


@pytest.mark.parametrize("dtype", ONEDNN_DTYPES)
@torch.no_grad()
def test_a_network_runs_without_the_weights_it_was_packed_from(dtype: torch.dtype | None) -> None:
    model, inputs = small()
    before = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in before.items()}
    kept = optimize(model, inputs, dtype)
    expected = kept(*inputs)
    assert "released" not in kept.explain()
    fast = optimize(model, inputs, dtype, weights="released")
    # whoever else holds a parameter does not keep its memory
    freed = {name for name, p in before.items() if p.numel() == 0}
    images = {name for name, shape in shapes.items() if len(shape) == 4}
    # in bfloat16 biases of convolutions are copies as well
    assert freed >= images
    assert (freed == images) == (dtype is None)
    assert torch.equal(fast(*inputs), expected)
    fast.prepare([5, 0, 999])
    assert distance(fast(*inputs), expected) < REORDERED
    after = dict(model.named_parameters())
    assert {name: p.shape for name, p in after.items()} == shapes
    megabytes = sum(shapes[name].numel() for name in freed) * 4 / 2**20
    assert f", {megabytes:.1f} MB released" in fast.explain()


NEEDS: list[tuple[str, Callable[[Any, Optimized, Any], Any]]] = [
    ("refresh", lambda model, fast, inputs: fast.refresh()),
    (r"\[1, 3, 4, 6\]", lambda model, fast, inputs: fast(torch.ones(1, 3, 4, 6), inputs[1][:1])),
    ("copy or pickle", lambda model, fast, inputs: copy.deepcopy(fast)),
    ("copy or pickle", lambda model, fast, inputs: pickle.dumps(fast)),
    ("conv2d", lambda model, fast, inputs: model(*inputs)),
    ("conv2d", lambda model, fast, inputs: fast(inputs[0].requires_grad_(), inputs[1])),
    ("weights='released'", lambda model, fast, inputs: model.state_dict()),
    ("weights='released'", lambda model, fast, inputs: copy.deepcopy(model)),
    ("weights='released'", lambda model, fast, inputs: pickle.dumps(model)),
    ("weights='released'", lambda model, fast, inputs: model.a.conv1.weight.sum()),
    ("weights='released'", lambda model, fast, inputs: optimize(model, inputs)),
]


@pytest.mark.parametrize(("message", "act"), NEEDS)
def test_what_needs_a_freed_weight_says_so(message: str, act: Callable[..., Any]) -> None:
    model, fast, inputs = released()
    with pytest.raises(WeightsReleased, match=message):
        act(model, fast, inputs)
    with torch.no_grad():
        assert fast(inputs[0].detach(), inputs[1]).isfinite().all(), "it still runs"


def test_a_model_without_weights_is_neither_loaded_nor_moved() -> None:
    model, _, _ = released()
    with pytest.raises(RuntimeError, match="weights='released'"):
        model.load_state_dict(small()[0].state_dict())
    with pytest.raises(WeightsReleased, match="weights='released'"):
        model.to(torch.bfloat16)


@torch.no_grad()
def test_weights_that_are_still_read_are_still_watched() -> None:
    model, fast, inputs = released()
    model.a.norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"a\.norm1\.weight"):
        fast(*inputs)


@torch.no_grad()
def test_a_weight_with_two_places_is_freed_in_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    model, x = Tied().eval(), torch.randn(2, 4, 5, 7)
    expected = model(x)
    fast = optimize(model, (x,), weights="released")
    assert distance(fast(x), expected) < REORDERED
    for conv in (model.a, model.b):
        with pytest.raises(WeightsReleased):
            conv(x)


def test_a_sampler_over_it_is_captured() -> None:
    unet, inputs = own()
    expected = Sampler(unet, Schedule.linear(), steps=4).sample((2, 3, 10, 6), seed=1)
    fast = optimize(unet, inputs, timesteps=range(0, 1000, 250), weights="released")
    sampler = Sampler(fast, Schedule.linear(), steps=4)
    assert distance(sampler.sample((2, 3, 10, 6), seed=1), expected) < 1e-4
    assert sampler.stats()["replays"] == 4, sampler.explain()


@torch.no_grad()
def test_tensors_made_while_tracing_are_kept() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.tensor([[0.5, 2.0], [1.5, -1.0]])
            out: Tensor = nn.functional.conv2d(self.conv(x), scale[:, :, None, None])
            return out

    model, x = Constant().eval(), torch.randn(2, 2, 5, 7)
    expected = model(x)
    fast = optimize(model, (x,), weights="released")
    assert distance(fast(x), expected) < REORDERED
    assert model.conv.weight.numel() == 4, "its shape is still known"


def test_what_cannot_be_exported_keeps_its_weights() -> None:
    class Branch(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.mean() > 0 else x

    model, x = Branch(3, 3, 1).eval(), torch.rand(1, 3, 4, 4)
    fast = optimize(model, (x,), weights="released")
    fast.refresh()
    assert torch.equal(fast(x), model(x))
    assert "released" not in fast.explain()


def test_constants_are_made_one_by_one() -> None:
    model, inputs = small()
    fast = optimize(model, inputs, torch.bfloat16)
    (network,) = fast.networks
    reads = [len(fold.reads) for fold in network.folds]
    assert max(reads) == 1, "each needs one weight, and no other's cast"
    assert sum(reads) >= 8


class Live(TorchDispatchMode):
    """The most bytes that ``weights`` and living results, views of weights too, ever took."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.holders: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                key, size = self._memory(made)
                self.holders[key] += 1
                self.sizes[key] = size
                weakref.finalize(made, self.holders.subtract, [key])
        held = dict(self._memory(weight) for weight in self.weights)
        held |= {key: self.sizes[key] for key, count in self.holders.items() if count}
        self.most = max(self.most, sum(held.values()))
        return result

    @staticmethod
    def _memory(tensor: Tensor) -> tuple[int, int]:
        """What identifies it, and its bytes; packed weights have no storage, and no views."""
        if tensor.layout is torch.strided:
            return tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        return -id(tensor), tensor.nbytes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_weights_and_constants_together_never_grow_by_more_than_a_layer(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(8))).eval()
    x = torch.randn(1, 32, 6, 4)
    weights = [p for p in model.parameters() if p.dim() == 4]
    layer, total = weights[0].nbytes, sum(p.nbytes for p in model.parameters())
    live: list[Live] = []
    bind = CompiledNetwork._bind_weights

    def watched(self: CompiledNetwork) -> None:
        live.append(Live(list(model.parameters())))
        with live[0]:
            bind(self)

    monkeypatch.setattr(CompiledNetwork, "_bind_weights", watched)
    alone = only("lower_precision", "channels_last", "prepack_convolutions")
    expected = model(x)
    fast = optimize(model, (x,), dtype, without=alone, weights="released")
    assert distance(fast(x), expected) < (REORDERED if dtype is None else BFLOAT16)
    assert all(p.numel() == 0 for p in weights), "they were packed"
    # one layer's cast and its packed copy, together at most as large as the layer, and two biases
    assert total < live[0].most < total + 1.1 * layer


@torch.no_grad()
def test_nothing_but_constants_stays_of_the_build() -> None:
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))).eval()
    x = torch.randn(1, 64, 8, 8)

    def large() -> dict[int, Tensor]:
        gc.collect()
        found = (o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))
        return {id(o): o for o in found if o.numel() > 10_000}

    before = large()
    fast = optimize(model, (x,), torch.bfloat16, weights="released")
    (network,) = fast.networks
    constants = list(network.constants.values())
    constants += [piece.memory for piece in network.workspace.free]  # of the run that tried it
    extra = set(large()) - set(before) - set(map(id, constants))
    assert not extra, [tuple(large()[key].shape) for key in extra]
