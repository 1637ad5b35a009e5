"""The compiled networks of a model: one for each kind of call, in each state the model was in."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from stepfuse.engine.compile import calls
from stepfuse.engine.compile.compiled import Compiled, compiled
from stepfuse.engine.compile.held_memory import released_weights
from stepfuse.engine.compile.listening import Ran, unseen
from stepfuse.engine.compile.network import Settings
from stepfuse.engine.compile.numbered import Numbered, numbered
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.state.random_sources import undrawn
from stepfuse.engine.compile.tracing.trace import one_at_a_time
from stepfuse.engine.compile.weights.released import WeightsReleased
from stepfuse.engine.compile.weights.watched import WeightGone
from stepfuse.engine.compile.without_graph import WithoutGraph, without_graph
from stepfuse.engine.replay.workspace import Workspace

RESTLESS = 8  # changes of one attribute after which nothing more is compiled for its next value
_ANY = -1  # the number of a state in which the model runs itself


class NetworkCache:
    """Networks of ``model``, compiled when a call comes that none of them serves.

    Whoever looks for one holds ``lock``; their results lie in one ``workspace``.

    Args:
        most: how many are kept, the least recently used one going first; those that are pinned stay
            beside them.
        timesteps: announced to each; a list that may grow.
        ignored: paths of `PythonState` that do not tell one state from another.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        most: int,
        timesteps: list[int],
        ignored: frozenset[str],
    ) -> None:
        self.model, self.settings, self.most = model, settings, most
        self.timesteps, self._ignored = timesteps, ignored
        self.lock, self.workspace = threading.RLock(), Workspace()
        self._networks: OrderedDict[Any, Compiled | Numbered] = OrderedDict()
        # number, kind, the rest; the latest that held comes first
        self._states: list[tuple[int, Any, PythonState]] = []
        self._count = 0
        self._changes: Counter[str] = Counter()
        self._pins: list[weakref.ref[Ran]] = []
        # of each kind of call, those of other settings that came
        self._settings: dict[Any, set[Any]] = {}

    @property
    def networks(self) -> list[Compiled | Numbered]:
        """All, the last in the order of use at the end."""
        return list(self._networks.values())

    def described(self) -> list[tuple[str, Compiled | Numbered]]:
        """All, and for what inputs each is, in words."""
        return [(calls.described(key[2]), network) for key, network in self._networks.items()]

    def restless(self) -> list[str]:
        """Paths of what changed so often that nothing more is compiled for another value."""
        return [path for path, count in self._changes.items() if count >= RESTLESS]

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, networks may be changed: nobody looks for one, or records what is done."""
        with one_at_a_time, self.lock, unseen():
            yield

    def current(self) -> list[Compiled | Numbered]:
        """Those for the state that the model is in."""
        state = self._state()
        return [network for key, network in self._networks.items() if key[0] == state]

    def refresh(self) -> None:
        """Let those of the model's state read the weights again; others are compiled anew."""
        self.refuse_if_released("refresh() reads the weights again")
        with self.changing():
            state = self._state()
            for key in [k for k in self._networks if k[0] != state]:
                del self._networks[key]
            for key, network in list(self._networks.items()):
                try:
                    network.refresh()
                except WeightGone:
                    del self._networks[key]

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Compiled | Numbered, list[Any]]:
        """What these arguments are like, what runs for them, compiled where nothing does, and the
        leaves to give it.
        """
        timed = self.settings.has_timestep
        args, kwargs = calls.as_declared(self.model, args, kwargs, 2 if timed else 1)
        leaves, spec = calls.flatten(args, kwargs)
        number = args[1] if timed and len(args) > 1 and calls.is_number(args[1]) else None
        described = tuple(calls.key(leaf) for leaf in leaves)
        if number is not None:
            described = (described[0], (f"timestep, {type(number).__name__}", None), *described[2:])
        with self.lock:
            call = self._counted(spec, described)
            network = self.known(call)
        if network is None:
            with one_at_a_time, self.lock:
                network = self.known(call) or self._made(call, args, kwargs, leaves)
        if number is not None and isinstance(network, Numbered):
            leaves[1] = network.tensor(number, leaves[0])
        return call, network, leaves

    def known(self, call: Any) -> Compiled | Numbered | None:
        """The network that serves such a call now, the last in the order of use."""
        # where the model runs itself, what it changes of itself does not matter
        itself = [k for k, n in self._networks.items() if k[1:] == call and n.alone]
        key = itself[0] if itself else (self._state(), *call)
        if key in self._networks:
            self._networks.move_to_end(key)
        return self._networks.get(key)

    def _counted(self, spec: Any, described: tuple[Any, ...]) -> Any:
        """The call as it is counted: without the values of its settings, where too many came."""
        call = (spec, described)
        loose = tuple(calls.of_any_value(part) for part in described)
        if loose == described:
            return call
        came = self._settings.setdefault((spec, loose), set())
        if len(came) < RESTLESS:
            came.add(described)
            return call
        return call if any(key[1:] == call for key in self._networks) else (spec, loose)

    def _made(
        self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> Compiled | Numbered:
        """A network for such a call, in the state that the model is in when it is made."""
        self.refuse_if_released(f"inputs of {calls.described(call[1])} need the weights again")
        # nothing of this belongs into a step that is being recorded
        state = self._state()
        undone = undrawn(self._states[0][2])
        with unseen(), undone, calls.fakeness(leaves):
            network = self.build(state, call[1], args, kwargs)
        key = (self._state(new=True), *call)
        self._networks[key] = network
        self._evict()
        return network

    def pin(self, ran: Ran) -> None:
        """Keep a network as long as ``ran`` lives: a captured step reads its constants and rows."""
        with self.lock:
            self._pins = [ref for ref in self._pins if ref() is not None]
            self._pins.append(weakref.ref(ran))

    def _evict(self) -> None:
        """Drop what is more than ``most``, but nothing that is pinned, nor the last."""
        pinned = {id(ran.network) for ref in self._pins if (ran := ref()) is not None}
        for key in list(self._networks)[:-1]:
            if len(self._networks) <= self.most:
                return
            if id(self._networks[key]) not in pinned:
                del self._networks[key]

    def _state(self, new: bool = False) -> int:
        """The number of the state that the model is in, a new one where it was in none of them.

        Where weights are released, no other than those that were compiled for can run: that is
        raised, unless the ``new`` one is what compiling has left.
        """
        kind = self._kind()
        serving = self._serving(kind)
        if serving is None and not new and released_weights(self.model):
            serving = self._serving(kind[:-1])  # in threads that it was not compiled for
        if serving is not None:
            self._states.insert(0, self._states.pop(serving))
            return self._states[0][0]
        changes = list(self._states[0][2].changes()) if self._states else []
        if self._states and not new:
            what = ", ".join(map(repr, changes)) or "the dtype or device of the weights"
            self.refuse_if_released(
                f"{what} changed since the network was compiled, which for another value is not to "
                "be had without the weights; put it back"
            )
        for path in changes:
            self._changes[path] += 1
            if self._changes[path] > RESTLESS:
                return _ANY
        self._count += 1
        self._states.insert(0, (self._count, kind, self._look()))
        for number, *_ in self._states[self.most :]:
            for key in [k for k in self._networks if k[0] == number]:
                del self._networks[key]
        del self._states[self.most :]
        return self._count

    def _kind(self) -> tuple[Any, ...]:
        """Dtype and device of the weights and, on the CPU, threads: oneDNN packs filters for so
        many and reads them slowly in others, and which kernel is the fastest depends on them.
        """
        first = next(self.model.parameters(), None)
        if first is None:
            return (None, None, torch.get_num_threads())
        threads = torch.get_num_threads() if first.device.type == "cpu" else None
        return (first.dtype, first.device, threads)

    def _serving(self, kind: tuple[Any, ...]) -> int | None:
        """Which of the states begins with this kind and holds."""
        for i, (_, known, state) in enumerate(self._states):
            if known[: len(kind)] == kind and state.holds():
                return i
        return None

    def _look(self) -> PythonState:
        roots = {"model": self.model}
        return PythonState(roots, training=False, weights=False, ignored=self._ignored)

    def build(
        self, state: int, described: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Compiled | Numbered:
        """What serves such a call of the model in this state."""
        kwargs, settings = dict(sorted(kwargs.items())), self.settings
        network: Compiled | Numbered
        if state == _ANY:
            reason = "an attribute changes again and again"
            network = WithoutGraph(self.model, args, kwargs, settings.dtype, reason, alone=True)
        elif any(map(calls.is_of_any_value, described)):
            reason, leaves = "an argument changes again and again", calls.flatten(args, kwargs)[0]
            network = without_graph(self.model, args, kwargs, settings.dtype, leaves, reason)
        elif settings.has_timestep and len(args) > 1 and calls.is_number(args[1]):
            network = numbered(self.model, args, kwargs, settings, self.workspace)
        else:
            network = compiled(self.model, args, kwargs, settings, self.workspace)
        network.prepare(self.timesteps)
        return network

    def refuse_if_released(self, what: str) -> None:
        """Raise `WeightsReleased` where weights were freed: ``what`` needs them."""
        if released_weights(self.model):
            runs = " or ".join(calls.described(key[2]) for key in self._networks) or "nothing"
            raise WeightsReleased(
                f"{what}, which weights='released' has freed; compiled for {runs}"
            )
