"""`optimize`: any U-Net in, the same function out, compiled by a few passes over its graph."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.compile import calls
from stepfuse.engine.compile.compiled import Compiled, Settings, compiled, without_graph
from stepfuse.engine.compile.held_memory import held_memory, released_weights
from stepfuse.engine.compile.listening import Ran, tell, unseen
from stepfuse.engine.compile.network import PASSES
from stepfuse.engine.compile.numbered import Numbered, numbered
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.state.random_sources import undrawn
from stepfuse.engine.compile.tracing.trace import one_at_a_time
from stepfuse.engine.compile.weights.released import WeightsReleased
from stepfuse.engine.compile.weights.watched import Holding, WeightGone
from stepfuse.engine.compile.without_graph import WithoutGraph
from stepfuse.engine.replay.workspace import Workspace
from stepfuse.kernels.arguments import (
    as_call,
    as_integers,
    check_kind,
    check_literal,
    check_precision,
    check_words,
)
from stepfuse.kernels.checks import as_integer

_RESTLESS = 8  # changes of one attribute after which nothing more is compiled for its next value
_ANY = -1  # the number of a state in which the model runs itself


class WeightsChanged(RuntimeError):
    """A weight is not what it was when the network was compiled; ``refresh`` reads it again."""


def optimize(
    model: nn.Module,
    example_inputs: Sequence[Any],
    dtype: torch.dtype | None = None,
    *,
    without: Collection[str] = (),
    timesteps: Iterable[int] = (),
    max_networks: int = 8,
    weights: Holding = "parked",
) -> Optimized:
    """Compile ``model(x, t, **condition)`` for inference: same arguments, same result, faster.

        unet = UNet2DModel.from_pretrained("google/ddpm-cifar10-32")        # of diffusers
        fast = optimize(unet, (torch.randn(1, 3, 32, 32), torch.tensor([0])), torch.bfloat16)

        fast(x, t).sample                # as unet(x, t).sample
        print(fast.explain())            # what was fused, and why not the rest

    Args:
        model: an nn.Module; neither it nor the values of its weights are changed (where they are:
            see ``weights``), and its dropout is off here.
        example_inputs: (x, t, ...) as the model takes them, x [N, C, H, W], t [N]; a dict at the
            end holds keyword arguments. Compiled for these shapes now, for others when they come.
        dtype: torch.bfloat16 (or float16) for convolutions, linear layers and attention; inputs and
            outputs keep the model's own dtype. What does not run in it on this machine is left in
            float32, as `Optimized.explain` tells. None computes in the model's dtype.
        without: names of passes to leave out, of `PASSES`.
        timesteps: to be announced at once, see `Optimized.prepare`.
        max_networks: how many shapes stay compiled, the least recently used one going first.
        weights: what becomes of a weight of ``model`` once it is packed, so that it is not held
            twice.

            "parked" moves it to an unnamed file in the temporary folder (``TMPDIR``), from where
            whatever asks for it reads it: the model itself, `Optimized.refresh`, state_dict, copies
            and new shapes work as ever. A tensor that somebody else holds, too, stays where it is,
            and all do where no folder has twice the space; `Optimized.explain` tells. Linux.

            "released" frees it. Only these shapes run then; whatever needs a freed weight raises
            `WeightsReleased`.

            "kept" leaves it in memory, and gives packed weights as much more of it as makes them
            faster: that saves up to a seventh of the time in float32, next to nothing in bfloat16.
            With the other two the process peaks no higher than where the model itself runs
            (measured in bench/NOTES.md).

    The model stays bitwise what it is, whatever happens: a mirror of it is traced. A change of its
    weights is noticed, and so is one of the Python state that its forward reads (the scale of an
    adapter, which one is active, a method put over another): each such state has its networks.

    Raises TypeError or ValueError for arguments that cannot be meant, and what the model itself
    raises for them. A pass that fails is left out and named; a model that cannot be traced has its
    GroupNorms exchanged instead, and `Optimized.explain` says why.
    """
    check_kind("model", model, nn.Module, "an nn.Module")
    check_precision("dtype", dtype)
    without = check_words("without", without, PASSES)
    check_literal("weights", weights, Holding)
    max_networks = as_integer("max_networks", max_networks)
    if max_networks < 1:
        raise ValueError(f"max_networks must be at least 1; got {max_networks}")
    fast = Optimized(
        model, None if dtype is torch.float32 else dtype, without, max_networks, weights
    )
    args, kwargs = as_call("example_inputs", example_inputs)
    fast.prepare(timesteps)
    fast.compile(*args, **kwargs)
    return fast


class Optimized(nn.Module):
    """A model with its compiled networks, one per shape of the inputs; made by `optimize`.

    The original is the submodule ``original``: parameters, device and dtype are its own. Copies and
    pickles hold the original and the settings, and compile again when they are called.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        without: Collection[str],
        max_networks: int,
        weights: Holding = "parked",
        ignored: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.original = model
        self.weights = weights
        self.dtype, self.without, self.max_networks = dtype, tuple(without), max_networks
        self.timesteps: list[int] = []
        self._never_counts = frozenset(ignored)  # paths of `PythonState`
        self._workspace = Workspace()
        self._forget()

    def _forget(self) -> None:
        """Nothing is compiled, and nothing is known of the model."""
        self._networks: OrderedDict[Any, Compiled | Numbered] = OrderedDict()
        # number, dtype and device of the weights, the rest; the latest that held comes first
        self._states: list[tuple[int, Any, PythonState]] = []
        self._count = 0
        self._changes: Counter[str] = Counter()
        # of each kind of call, those of other settings that came
        self._settings: dict[Any, set[Any]] = {}
        self._lock = threading.RLock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model(x, t, **condition)``; t may be a tensor or a number.

        Where a gradient with respect to an input is wanted, the original runs: the compiled
        networks have none. So it does under autocast. Threads may call at the same time.

        Raises `WeightsChanged` after a weight was changed.
        """
        if torch.is_autocast_enabled(_device(args, kwargs)):
            return self.original(*args, **kwargs)
        if torch.is_grad_enabled() and any(
            isinstance(leaf, Tensor) and leaf.requires_grad
            for leaf in calls.flatten(args, kwargs)[0]
        ):
            return self.original(*args, **kwargs)
        with torch.no_grad():
            call, network, leaves = self._network(args, kwargs)
            tell(Ran(self, call, network))
            self._check(network)
            return network(leaves)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile for the shapes of these arguments, if that has not been done."""
        with torch.no_grad():
            self._network(args, kwargs)

    def prepare(self, timesteps: Iterable[int]) -> None:
        """Announce timesteps: what depends on them alone becomes a row of a table.

        Other timesteps still work, by computing it. A step that was recorded (a captured sampler)
        after this call reads the table only: there, a timestep that was not announced raises
        IndexError on the CPU and gives NaN on CUDA.

        Raises TypeError for what is no whole number, ValueError for a timestep that is negative or
        above 4095.
        """
        wanted = as_integers("timesteps", timesteps, "a list of indices", ordered=False)
        if wanted and min(wanted) < 0:
            raise ValueError(f"timesteps must be at least 0; got {min(wanted)}")
        with one_at_a_time, self._lock, unseen():
            for network in self._networks.values():
                network.prepare(wanted)
            self.timesteps = list(dict.fromkeys([*self.timesteps, *wanted]))

    def refresh(self) -> None:
        """Read the weights again after they were changed (EMA, LoRA) or replaced.

        Packed copies and tables are rewritten in place, so that recorded steps follow. Networks of
        another state of the model are compiled again when it comes back to that. Raises
        `WeightsReleased` where there is nothing to read any more.
        """
        self._refuse_if_released("refresh() reads the weights again")
        with one_at_a_time, self._lock, unseen():
            state = self._state()
            for key in [k for k in self._networks if k[0] != state]:
                del self._networks[key]
            for key, network in list(self._networks.items()):
                try:
                    network.refresh()
                except WeightGone:
                    del self._networks[key]

    def check_weights(self) -> None:
        """Raise `WeightsChanged` where a weight is not what the compiled networks hold."""
        with self._lock:
            state = self._state()
            for key, network in self._networks.items():
                if key[0] == state:
                    self._check(network)

    def watched_instead(self) -> tuple[Any, ...]:
        """Whose Python state decides what this computes."""
        return (self.original,)

    def explain(self) -> str:
        """Per compiled shape, what every pass matched, and why not the rest."""
        parts = []
        for key, network in self._networks.items():
            lines = [
                f"inputs                 {calls.described(key[2])}",
                *(str(r) for r in network.reports),
            ]
            lines.append(f"memory                 {held_memory(self.original, network)}")
            parts.append("\n".join(lines))
        if self.timesteps:
            parts.append(f"timesteps              {len(self.timesteps)} announced")
        restless = [path for path, count in self._changes.items() if count >= _RESTLESS]
        if restless:
            parts.append(
                f"as it is               {', '.join(restless)} changed {_RESTLESS} times: for "
                "other values the model itself runs"
            )
        if self.without:
            parts.append(f"left out               {', '.join(self.without)}")
        return "\n\n".join(parts) or "nothing compiled yet"

    def _check(self, network: Compiled | Numbered) -> None:
        name = network.changed()
        if name is not None:
            raise WeightsChanged(
                f"weight {name!r} was changed after the network was compiled; call refresh()"
            )

    def _network(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Compiled | Numbered, list[Any]]:
        """What these arguments are like, what runs for them, compiled where nothing does, and the
        leaves to give it.
        """
        args, kwargs = calls.as_declared(self.original, args, kwargs)
        leaves, spec = calls.flatten(args, kwargs)
        number = args[1] if len(args) > 1 and calls.is_number(args[1]) else None
        described = tuple(calls.key(leaf) for leaf in leaves)
        if number is not None:
            described = (described[0], (f"timestep, {type(number).__name__}", None), *described[2:])
        with self._lock:
            call = self._counted(spec, described)
            network = self._known(call)
        if network is None:
            with one_at_a_time, self._lock:
                network = self._known(call) or self._made(call, args, kwargs, leaves)
        if number is not None and isinstance(network, Numbered):
            leaves[1] = network.tensor(number, leaves[0])
        return call, network, leaves

    def _known(self, call: Any) -> Compiled | Numbered | None:
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
        if len(came) < _RESTLESS:
            came.add(described)
            return call
        return call if any(key[1:] == call for key in self._networks) else (spec, loose)

    def _made(
        self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]
    ) -> Compiled | Numbered:
        """A network for such a call, in the state that the model is in when it is made."""
        self._refuse_if_released(f"inputs of {calls.described(call[1])} need the weights again")
        # nothing of this belongs into a step that is being recorded
        state = self._state()
        undone = undrawn(self._states[0][2])
        with unseen(), undone, calls.fakeness(leaves):
            network = self._build(state, call[1], args, kwargs)
        key = (self._state(new=True), *call)
        self._networks[key] = network
        while len(self._networks) > self.max_networks:
            self._networks.popitem(last=False)
        return network

    def _state(self, new: bool = False) -> int:
        """The number of the state that the model is in, a new one where it was in none of them.

        Where weights are released, no other than those that were compiled for can run: that is
        raised, unless the ``new`` one is what compiling has left.
        """
        first = next(self.original.parameters(), None)
        kind = None if first is None else (first.dtype, first.device)
        for i, (number, known, state) in enumerate(self._states):
            if known == kind and state.holds():
                if i:
                    self._states.insert(0, self._states.pop(i))
                return number
        changes = list(self._states[0][2].changes()) if self._states else []
        if self._states and not new:
            what = ", ".join(map(repr, changes)) or "the dtype or device of the weights"
            self._refuse_if_released(
                f"{what} changed since the network was compiled, which for another value is not to "
                "be had without the weights; put it back"
            )
        for path in changes:
            self._changes[path] += 1
            if self._changes[path] > _RESTLESS:
                return _ANY
        self._count += 1
        self._states.insert(0, (self._count, kind, self._look()))
        for number, *_ in self._states[self.max_networks :]:
            for key in [k for k in self._networks if k[0] == number]:
                del self._networks[key]
        del self._states[self.max_networks :]
        return self._count

    def _look(self) -> PythonState:
        roots = {"model": self.original}
        return PythonState(roots, training=False, weights=False, ignored=self._never_counts)

    def _build(
        self, state: int, described: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Compiled | Numbered:
        kwargs = dict(sorted(kwargs.items()))
        settings = Settings(self.dtype, self.without, self.weights)
        network: Compiled | Numbered
        if state == _ANY:
            reason = "an attribute changes again and again"
            network = WithoutGraph(self.original, args, kwargs, self.dtype, reason, alone=True)
        elif any(map(calls.is_of_any_value, described)):
            reason, leaves = "an argument changes again and again", calls.flatten(args, kwargs)[0]
            network = without_graph(self.original, args, kwargs, settings, leaves, reason)
        elif len(args) > 1 and calls.is_number(args[1]):
            network = numbered(self.original, args, kwargs, settings, self._workspace)
        else:
            network = compiled(self.original, args, kwargs, settings, self._workspace)
        network.prepare(self.timesteps)
        return network

    def _refuse_if_released(self, what: str) -> None:
        if released_weights(self.original):
            runs = " or ".join(calls.described(key[2]) for key in self._networks) or "nothing"
            raise WeightsReleased(
                f"{what}, which weights='released' has freed; compiled for {runs}"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_if_released("a copy or pickle compiles from the weights again")
        compiled_here = ("_networks", "_states", "_changes", "_settings", "_lock", "_count")
        return {name: v for name, v in self.__dict__.items() if name not in compiled_here}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The type of device of the first tensor among the arguments."""
    found = (v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return next(found, "cpu")
