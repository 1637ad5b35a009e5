"""The weights of a network: where they live, and whether they are still what was packed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from stepfuse.engine.compile.weights import parked, turned
from stepfuse.engine.compile.weights.released import Released
from stepfuse.kernels.torch_names import FakeTensor

Holding = Literal["parked", "kept", "released"]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightGone(LookupError):
    """A weight that a network was compiled with is not in the model now."""


def find(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns the parameter or buffer ``name``, and its name there."""
    path, _, leaf = name.rpartition(".")
    owner: nn.Module = model
    for part in path.split(".") if path else ():
        child = owner._modules[part]  # not by attribute, which a class may define otherwise
        assert child is not None
        owner = child
    return owner, leaf


class Weights:
    """The parameters and buffers a network was built from.

    ``holding`` says what becomes of those that only constants are made of, once they are made: they
    are moved to a file (see `parked`), kept in memory, or freed (see `Released`). ``note`` says why
    some that were to be parked are in memory still.

    ``changed`` compares, for each of them, the tensor itself, its address, its version counter, and
    (CPU) one element of it: writing through ``.data`` does not raise the counter.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], holding: Holding) -> None:
        self._model, self.holding, self.note = model, holding, ""
        self._owners = {name: find(model, name) for name in names}
        self.read()
        _all.add(self)

    def read(self) -> dict[str, Tensor]:
        """The weights as they are now, which from here on are the unchanged ones."""
        tensors = {name: _held(owner, leaf) for name, (owner, leaf) in self._owners.items()}
        self._watched = {
            name: _watch(*self._owners[name], tensor)
            for name, tensor in tensors.items()
            if not isinstance(tensor, FakeTensor)  # they have no memory that could change
        }
        self._state = self._now()
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def changed(self) -> str | None:
        """The name of a weight that is not what it was, or None."""
        now = self._now()
        if now == self._state:
            return None
        pairs = zip(self._watched, now, self._state, strict=True)
        return next(name for name, new, old in pairs if new != old)

    @contextlib.contextmanager
    def leaving(self, names: Iterable[str]) -> Iterator[Callable[[str], Tensor | None]]:
        """What makes one of ``names`` leave memory; by then nobody may hold a tensor of it.

        It returns the weight where that is now, or None if it was freed.
        """
        if self.holding == "kept":
            yield lambda name: _held(*self._owners[name]).detach()
        elif self.holding == "released":
            yield self._release
        else:
            tensors = [_held(*self._owners[name]) for name in names]
            parking = parked.Parking(tensors)
            try:
                yield lambda name: self._park(_held(*self._owners[name]), parking)
            finally:
                parking.close(tensors)
                self.note = parking.note

    def turn(self, name: str, layout: torch.memory_format) -> tuple[Tensor, str]:
        """Let a weight lie in ``layout``, if nobody holds a tensor of it; and why it does not."""
        tensor = _held(*self._owners[name])
        if tensor.is_contiguous(memory_format=layout):
            return tensor.detach(), ""
        with _moving([tensor]):
            reason = turned.obstacle(tensor)
            if not reason:
                turned.turn(tensor, layout)
        return tensor.detach(), reason

    def turn_back(self, names: Iterable[str]) -> None:
        """Let those of these weights that were turned lie as before."""
        tensors = [_held(*self._owners[name]) for name in names]
        with _moving(tensors):
            turned.turn_back(tensors, forced=True)

    def evict(self, names: Iterable[str]) -> None:
        """Forget what was read back of those of ``names`` that are parked."""
        files = parked.Files()
        for tensor in (_held(*self._owners[name]) for name in names):
            if tensor in files:
                parked.leave_memory(tensor)

    def _park(self, tensor: Tensor, parking: parked.Parking) -> Tensor:
        places = [n for n, watched in self._watched.items() if watched[2] is tensor]
        bits = [self._watched[name][-1][0] for name in places]
        for name in places:
            self._watched[name] = ()  # a probe holds the memory, too
        try:
            parking.park(tensor)
        finally:
            for name, bit in zip(places, bits, strict=True):
                self._watched[name] = watched = _watch(*self._owners[name], tensor)
                probe = watched[-1]
                if isinstance(probe, memoryview) and parking.files.can_write(tensor):
                    probe[0] = bit  # a page of our own: looking there never waits for a disk
                self._state[list(self._watched).index(name)] = _state(watched)
        return tensor.detach()

    def _release(self, name: str) -> None:
        """Free the memory of a weight, wherever in the model it stands; it cannot be read again."""
        tensor = _held(*self._owners.pop(name))
        self._watched.pop(name, None)
        self._state = self._now()
        stand_in = Released.of(tensor)
        for module in self._model.modules():
            for table in (module._parameters, module._buffers):
                for leaf, held in table.items():
                    if held is tensor:
                        table[leaf] = stand_in
        # others may hold the parameter itself
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def _look_away(self, ids: set[int]) -> dict[str, Tensor]:
        """Those of the tensors of these ids that are what they were: they are not watched now."""
        found = {
            name: watched[2]
            for (name, watched), state in zip(self._watched.items(), self._state, strict=True)
            if watched and id(watched[2]) in ids and _state(watched) == state
        }
        self._watched.update(dict.fromkeys(found, ()))  # a probe holds the memory, too
        return found

    def _watch_again(self, tensors: dict[str, Tensor]) -> None:
        """What these weights are now is what they were."""
        places = list(self._watched)
        for name, tensor in tensors.items():
            self._watched[name] = watched = _watch(*self._owners[name], tensor)
            self._state[places.index(name)] = _state(watched)

    def _now(self) -> list[tuple[Any, ...]]:
        return [_state(watched) for watched in self._watched.values()]


_all: WeakSet[Weights] = WeakSet()


@contextlib.contextmanager
def _moving(tensors: Collection[Tensor]) -> Iterator[None]:
    """Inside, weights get other memory and stay what they are, for whatever network has them."""
    ids = set(map(id, tensors))
    unchanged = [(weights, weights._look_away(ids)) for weights in list(_all)]
    try:
        yield
    finally:
        for weights, watched in unchanged:
            weights._watch_again(watched)


def turn_back(model: nn.Module) -> None:
    """Let the weights of a model lie as they did before networks of it turned them.

    Those that somebody else holds by now stay.
    """
    tensors = [w for w in (*model.parameters(), *model.buffers()) if turned.is_turned(w)]
    with _moving(tensors):
        turned.turn_back(tensors)


def _state(watched: tuple[Any, ...]) -> tuple[Any, ...]:
    held, leaf, tensor, counted, address, probe = watched
    if tensor.data_ptr() != address:
        return ()  # share_memory frees what the probe looks at
    return held.get(leaf) is tensor, tensor._version if counted else 0, probe[0]


def _watch(owner: nn.Module, leaf: str, tensor: Tensor) -> tuple[Any, ...]:
    """Where it stands, itself, whether it counts how often it was written to, its address, and a
    probe.
    """
    counted, address = not tensor.is_inference(), tensor.data_ptr()
    return _table(owner, leaf), leaf, tensor, counted, address, probe(tensor)


def _table(owner: nn.Module, leaf: str) -> Any:
    """The dictionary of the module that holds it."""
    return owner._parameters if leaf in owner._parameters else owner._buffers


def _held(owner: nn.Module, leaf: str) -> Tensor:
    tensor = _table(owner, leaf).get(leaf)
    if not isinstance(tensor, Tensor):
        raise WeightGone(f"the model has no weight {leaf!r} any more where it had one")
    return tensor


def probe(tensor: Tensor) -> Any:
    """An indexable view of one element's bits; of nothing where they cannot be read cheaply."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.is_complex():
        return (0,)
    flat = tensor.detach()
    one = flat.as_strided((1,), (1,), flat.storage_offset() + _middle(flat))
    bits: Any = one.view(_BITS[one.element_size()]).numpy()
    return memoryview(bits)


def _middle(tensor: Tensor) -> int:
    """Offset of the element in the middle of every dimension."""
    return sum(
        (size // 2) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
