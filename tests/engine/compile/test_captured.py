"""Networks captured on their own: the same results, memory of the caller's own, captured again."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from tests.engine.compile.emulated_graphs import EmulatedGraphs
from tests.engine.compile.fake_cuda import DEVICE, fake_cuda, module_on_cuda
from tests.engine.compile.networks import distance, own, small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepfuse import CFG, Sampler, Schedule
from stepfuse.engine.compile import captured
from stepfuse.engine.compile.network import CompiledNetwork, Settings
from stepfuse.engine.compile.optimize import Optimized, WeightsChanged, optimize

REORDERED = 1e-5  # float32 sums in another order, through some twenty layers


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_results_are_those_of_the_network(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast, plain = optimize(model, (x, t)), optimize(model, (x, t), graph=None)
    for repeat in range(3):
        image, times = torch.randn_like(x), torch.tensor([repeat, 17, 999])
        given = image.clone()
        assert torch.equal(fast(image, times), plain(image, times))
        assert torch.equal(image, given)
    assert [graph.replays for graph in graphs.made] == [3]
    assert "graph                  captured, 3 replays" in fast.explain()
    assert "graph " not in plain.explain()


def test_a_caller_may_keep_results_and_write_to_them(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    first = fast(x, t)
    kept = first.clone()
    second = fast(-x, t)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    first.zero_()
    assert torch.equal(fast(x, t), kept)
    assert len({v.data_ptr() for v in (first, second, *graphs.made[0].results)}) == 3


def test_every_layout_of_a_shape_is_copied_to_one_buffer(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    for image in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.flip(3).transpose(2, 3).contiguous().transpose(2, 3),
        x[:1].expand(3, -1, -1, -1),
    ):
        for times in (t, t[:1].expand(3)):
            assert distance(fast(image, times), model(image, times)) < REORDERED


def test_what_is_no_tensor_is_returned_as_it_is(graphs: EmulatedGraphs) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> dict[str, Any]:
            y = self.conv(x) * scale
            return {"y": y, "pair": (y, x), "count": 3, "weight": self.conv.weight}

    x, t = torch.randn(2, 3, 4, 5), torch.tensor([1, 2])
    model = Several().eval()
    fast = optimize(model, (x, t))
    for scale in (1.0, 2.0):
        found, expected = fast(x, t, scale=scale), model(x, t, scale=scale)
        assert found.keys() == expected.keys()
        assert distance(found["pair"][0], expected["y"]) < REORDERED
        assert found["count"] == 3
        assert torch.equal(found["pair"][1], x)
        found["pair"][1].zero_()
        found["weight"].zero_()
    assert len(graphs.made) == 2
    assert x.abs().min() > 0
    assert model.conv.weight.abs().min() > 0


def test_announced_timesteps_are_read_from_the_table(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    fast(x, t)
    fast.prepare([4, 10])
    (network,) = fast.networks
    assert isinstance(network, CompiledNetwork)
    assert network.table is not None
    for announced in ([4], [10], [8, 9, 4]):
        fast.prepare(announced)
        times = torch.tensor([announced[0]] * 3)
        assert distance(fast(x, times), model(x, times)) < REORDERED
    assert len(graphs.made) == 2, "the table of the CPU does not move"


def test_a_table_that_moved_is_captured_again(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    (network,) = fast.networks
    assert isinstance(network, CompiledNetwork)
    assert network.table is not None
    network.table.grows = True
    for announced in ([4, 10], [8], [9]):
        fast.prepare(announced)
        for timestep in (4, announced[-1]):
            times = torch.full((3,), timestep)
            assert distance(fast(x, times), model(x, times)) < REORDERED
    assert "graph                  captured 2 times, 6 replays" in fast.explain()
    # rows for 2 at first, then for 4
    assert [graph.replays for graph in graphs.made] == [2, 4]


def test_changed_weights_are_read_at_a_refresh(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    fast(x, t)
    model.a.norm1.weight.mul_(1.5)
    model.first.weight.mul_(0.5)
    with pytest.raises(WeightsChanged):
        fast(x, t)
    fast.refresh()
    assert distance(fast(x, t), model(x, t)) < REORDERED
    assert len(graphs.made) == 1, "they were written where they lie"
    # a norm reads its weight where it lies, a convolution has a packed copy
    model.a.norm1.weight.data = model.a.norm1.weight.data * 2
    model.first.weight.data = model.first.weight.data + 0.1
    fast.refresh()
    assert distance(fast(x, t), model(x, t)) < REORDERED
    assert len(graphs.made) == 2


def test_what_moves_again_and_again_is_not_captured(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    for _ in range(captured._RESTLESS + 3):
        model.a.norm1.weight.data = model.a.norm1.weight.data * 1.01
        fast.refresh()
        assert distance(fast(x, t), model(x, t)) < REORDERED
    assert len(graphs.made) == captured._RESTLESS
    assert "operator by operator: what it reads was put elsewhere 16 times" in fast.explain()


def test_numbers_as_timesteps(graphs: EmulatedGraphs) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, t: Any) -> Tensor:
            out: Tensor = self.conv(x) * torch.as_tensor(t).float().reshape(-1, 1, 1, 1).cos()
            return out

    model, x = Embedded().eval(), torch.randn(2, 3, 4, 5)
    fast = optimize(model, (x, 3))
    for t in (3, 8, 900):
        assert distance(fast(x, t), model(x, t)) < REORDERED
    assert [graph.replays for graph in graphs.made] == [3]


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_who_records_sees_every_operator(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    for _ in range(2):  # before there is a graph, and beside one
        with Seen() as seen:
            fast(x, t)
        graphs.capturing = True
        assert distance(fast(x, t), model(x, t)) < REORDERED
        graphs.capturing = False
        assert seen.count > 10
        fast(x, t)
    assert [graph.replays for graph in graphs.made] == [2]
    untouched = optimize(model, (x, t), passes=())
    functional = torch.func.functionalize(lambda image: untouched(image, t))
    assert distance(functional(x), model(x, t)) < REORDERED
    assert len(graphs.made) == 1
    assert graphs.made[0].replays == 2


def test_gradients_come_from_the_model(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    with torch.enable_grad():
        asked = x.clone().requires_grad_()
        fast(asked, t).sum().backward()
    assert asked.grad is not None
    assert not graphs.made


def test_under_inference_mode(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    with torch.inference_mode():
        first = fast(x, t)
    assert first.is_inference()
    assert torch.equal(fast(x, t), first)
    with torch.inference_mode():
        assert torch.equal(fast(x.clone(), t), first)
    assert [graph.replays for graph in graphs.made] == [3]


def test_a_sampler_captures_the_whole_step_itself(graphs: EmulatedGraphs) -> None:
    unet, inputs = own(num_classes=3)
    fast = optimize(unet, (*inputs, {"labels": torch.tensor([0, 1])}))
    sampler = Sampler(
        fast, Schedule.linear(), steps=3, guidance=CFG(2.0, unconditional={"labels": None})
    )
    sampler.sample((2, 3, 10, 6), condition={"labels": torch.tensor([0, 1])})
    assert sampler.stats()["eager_steps"] == 0
    assert not graphs.made


def test_a_refused_capture_is_told_and_tried_once(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    graphs.refuses = "operation not permitted when stream is capturing"
    for _ in range(2):
        assert distance(fast(x, t), model(x, t)) < REORDERED
        graphs.refuses = graphs.refuses and "another"
    assert "operator by operator: operation not permitted when stream" in fast.explain()
    graphs.refuses = ""
    fast(x, t)
    assert not graphs.made


def test_a_graph_dies_with_its_network(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t), max_networks=2)
    watched = []
    for count in (1, 2, 1, 3, 1, 2):
        assert distance(fast(x[:count], t[:count]), model(x[:count], t[:count])) < REORDERED
        (known,) = [fast._captures._known[fast.networks[-1]]]
        watched.append(weakref.ref(known))
    del known
    graphs.made.clear()
    gc.collect()
    # of 1 there was one all the time; those of the first 2 and of 3 are gone
    alive = [ref() is not None for ref in watched]
    assert alive == [True, False, True, False, True, True]
    assert len(fast._captures._known) == 2


def test_copies_and_pickles_capture_anew(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t), graph=None)
    expected = fast(x, t)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert again.graph is None
        assert distance(again(x, t), expected) < REORDERED
    assert not graphs.made
    auto = pickle.loads(pickle.dumps(optimize(model, (x, t))))
    assert torch.equal(auto(x, t), auto(x, t))
    assert [graph.replays for graph in graphs.made] == [2]


def test_threads_take_turns(graphs: EmulatedGraphs) -> None:
    model, (x, t) = small()
    fast = optimize(model, (x, t))
    images = [torch.randn_like(x) for _ in range(4)]
    expected = [model(image, t) for image in images]
    wrong: list[float] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                error = distance(fast(images[i], t), expected[i])
                if error > REORDERED:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [graph.replays for graph in graphs.made] == [40]
    assert graphs.turns == 40


@pytest.mark.parametrize("graph", ["loop", "none", 1, True])
def test_another_word_is_refused(graph: Any) -> None:
    model, inputs = small()
    with pytest.raises(ValueError, match="graph must be 'auto' or None; got"):
        optimize(model, inputs, graph=graph)


def test_on_the_cpu_nothing_is_captured() -> None:
    model, inputs = small()
    fast = optimize(model, inputs)
    fast(*inputs)
    assert "graph " not in fast.explain()
    assert len(fast._captures._known) == 0


def test_networks_on_cuda_can_be_captured() -> None:
    with fake_cuda():
        x = torch.empty(2, 3, 10, 6, device=DEVICE)
        t = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        network = CompiledNetwork(module_on_cuda(lambda: own()[0]), (x, t), {}, Settings())
        assert network.effect == ""
        assert captured.GRAPHS.serves(DEVICE)
        assert not captured.GRAPHS.serves(torch.device("cpu"))
        assert captured._obstacle(network, [x, t], DEVICE) == ""
        assert captured._obstacle(network, [x, torch.zeros(2, device="cpu")], DEVICE) == (
            "an argument is on cpu, another on cuda:0"
        )


def test_fake_tensors_are_not_captured() -> None:
    with fake_cuda():
        model = module_on_cuda(lambda: own()[0])
        fast = Optimized(model, None, (), 2)
        image = torch.empty(2, 3, 10, 6, device=DEVICE)
        times = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        assert fast(image, times).shape == image.shape
    assert len(fast._captures._known) == 0
