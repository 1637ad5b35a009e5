"""The table of the timestep: what it allocates, when it moves, what has no row."""

from __future__ import annotations

import weakref

import pytest
import torch
from tests.engine.compile.fake_cuda import DEVICE, fake_cuda, module_on_cuda
from tests.engine.compile.networks import own, stable_diffusion
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepfuse import Sampler, Schedule
from stepfuse.engine.compile.network import CompiledNetwork, Settings
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.timetable import CAPACITY, TimeTable

WIDTHS = (3, 2)


def table(grows: bool, kind: str = "cpu") -> TimeTable:
    """Of t, t + 1, t + 2 and 2t, 3t, for batches of two."""

    def compute(t: Tensor) -> tuple[Tensor, ...]:
        column = t.to(torch.float32)[:, None]
        return torch.cat([column, column + 1, column + 2], 1), torch.cat(
            [column * 2, column * 3], 1
        )

    shapes = [torch.Size((2, width)) for width in WIDTHS]
    made = TimeTable(compute, torch.zeros(2, dtype=torch.int64, device=kind), shapes)
    made.grows = grows
    return made


def rows_of(made: TimeTable, timesteps: list[int]) -> list[list[float]]:
    first, second = made.lookup(torch.tensor(timesteps))
    return torch.cat([first, second], 1).tolist()


def expected(timesteps: list[int]) -> list[list[float]]:
    return [[t, t + 1, t + 2, 2 * t, 3 * t] for t in timesteps]


@pytest.mark.parametrize("grows", [False, True])
def test_rows_are_those_of_the_timesteps(grows: bool) -> None:
    made = table(grows)
    for announced in ([7, 0, 999], [7, 4], range(40, 300, 7), [CAPACITY - 1]):
        made.prepare(announced)
        known = list(made.filled)
        assert rows_of(made, known) == expected(known)
    made.refill()
    assert rows_of(made, known) == expected(known)


def test_a_growing_table_has_the_announced_rows() -> None:
    made = table(True)
    row, index = 4 * sum(WIDTHS), 8 * (CAPACITY + 2)
    assert made.nbytes() == 0
    made.prepare(range(50))
    assert made.table is not None
    assert (made.nbytes(), made.moves) == (51 * row + index, 0)
    made.prepare([50])
    assert (made.nbytes(), made.moves) == (101 * row + index, 1)
    made.prepare(range(51, 100))
    assert (len(made.table), made.moves) == (101, 1)
    made.prepare(range(CAPACITY))
    assert (made.nbytes(), made.moves) == ((CAPACITY + 1) * row + index, 2)
    assert rows_of(made, [0, 77, CAPACITY - 1]) == expected([0, 77, CAPACITY - 1])


def test_one_by_one_it_moves_a_few_times_only() -> None:
    made = table(True)
    for t in range(1000):
        made.prepare([t])
    assert made.moves == 10  # 1, 2, 4 ... 1024 rows


def test_an_unannounced_timestep_has_no_row() -> None:
    growing, fixed = table(True), table(False)
    for made in (growing, fixed):
        made.prepare([3])
    for other in (4, 0, CAPACITY - 1, CAPACITY, 2**40, -1, -(2**40)):
        first, second = growing.lookup(torch.tensor([3, other]))
        assert first[0].tolist() == [3, 4, 5]
        assert first[1].isnan().all()
        assert second[1].isnan().all()
    with pytest.raises(IndexError):
        fixed.lookup(torch.tensor([4]))


def test_the_old_table_keeps_its_rows_and_gets_no_others() -> None:
    made = table(True)
    made.prepare([3, 5])
    assert made.table is not None
    assert made.rows is not None
    old, rows = made.table, made.rows

    def read(t: int) -> Tensor:
        return old.index_select(0, rows.index_select(0, torch.tensor([t + 1])))

    before = read(5).clone()
    made.prepare(range(9))
    assert made.table is not old
    assert torch.equal(read(5), before)
    assert read(8).isnan().all()


def test_on_the_cpu_it_never_moves() -> None:
    made = table(False)
    made.prepare([1])
    assert made.table is not None
    at = made.table.data_ptr()
    made.prepare(range(2000))
    assert (made.table.data_ptr(), made.moves) == (at, 0)
    assert made.nbytes() == 2000 * 4 * sum(WIDTHS)


def test_samples_with_rows_of_their_own_have_no_table() -> None:
    made = table(True)
    made.prepare([1])
    made.compute = lambda t: (torch.arange(2.0)[:, None] + t[:, None],)
    made.refill()
    assert (made.differs, made.table, made.filled, made.moves) == (True, None, {}, 1)


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the fake CUDA memory that was made inside and is held still."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._made.append(weakref.ref(leaf))
        return result

    def bytes(self) -> int:
        held = [tensor.untyped_storage() for ref in self._made if (tensor := ref()) is not None]
        return sum({storage._cdata: storage.nbytes() for storage in held}.values())


def test_stable_diffusion_on_cuda_takes_what_fifty_steps_need() -> None:
    with fake_cuda():
        half = torch.float16
        x = torch.empty(2, 4, 64, 64, dtype=half, device=DEVICE)
        t = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        text = torch.empty(2, 77, 768, dtype=half, device=DEVICE)
        model = module_on_cuda(stable_diffusion, half)
        network = CompiledNetwork(model, (x, t), {"encoder_hidden_states": text}, Settings())
        assert network.table is not None
        before = network.nbytes()
        with Allocated() as allocated:
            network.prepare(range(0, 1000, 20))
        width = sum(network.table.widths)
        taken = 51 * width * 2 + (CAPACITY + 2) * 8
        assert allocated.bytes() == network.nbytes() - before == taken
    # projections of 5 blocks of 320 channels and 7 of 640; 4097 such rows would be 49.8 MB
    assert (width, taken) == (5 * 320 + 7 * 640, 652_944)


def test_a_sampler_captures_again_when_the_table_has_moved() -> None:
    unet, inputs = own()
    fast = optimize(unet, inputs)
    (network,) = fast.networks
    assert isinstance(network, CompiledNetwork)
    assert network.table is not None
    network.table.grows = True
    sampler = Sampler(fast, Schedule.linear(), steps=4)
    for repeat in range(2):
        sampler.sample(inputs[0].shape, seed=0)
        assert (sampler.stats()["captures"], network.moves) == (1, 0), repeat
    sampler.set_timesteps(7)
    image = sampler.sample(inputs[0].shape, seed=0)
    assert (sampler.stats()["captures"], network.moves) == (2, 1)
    assert sampler.stats()["eager_steps"] == 0
    plain = Sampler(unet, Schedule.linear(), steps=7)
    torch.testing.assert_close(image, plain.sample(inputs[0].shape, seed=0), rtol=0, atol=1e-3)
