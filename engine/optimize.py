"""`optimize`: any U-Net in, the same function out, compiled by a few passes over its graph."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from stepfuse.engine.passes.network import PASSES, Network
from stepfuse.engine.passes.parked import Files
from stepfuse.engine.passes.released import Released, WeightsReleased
from stepfuse.engine.passes.replacement import with_fused_norms
from stepfuse.engine.passes.runs import has_instructions
from stepfuse.engine.passes.trace import CannotTrace
from stepfuse.engine.passes.weights import Holding
from stepfuse.engine.passes.workspace import Workspace

_HOLDINGS = get_args(Holding)
_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


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

    Raises TypeError or ValueError for arguments that cannot be meant. A model that cannot be traced
    is not an error: its GroupNorms are exchanged instead, and `Optimized.explain` says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {_DTYPES}; got {dtype}")
    unknown = sorted(set(without) - set(PASSES))
    if unknown:
        raise ValueError(f"no pass is named {unknown[0]!r}; accepted: {', '.join(PASSES)}")
    if weights not in _HOLDINGS:
        raise ValueError(f"weights must be one of {', '.join(_HOLDINGS)}; got {weights!r}")
    if max_networks < 1:
        raise ValueError(f"max_networks must be at least 1; got {max_networks}")
    fast = Optimized(
        model, None if dtype is torch.float32 else dtype, without, max_networks, weights
    )
    args = tuple(example_inputs)
    kwargs: Mapping[str, Any] = {}
    if args and isinstance(args[-1], dict):
        args, kwargs = args[:-1], args[-1]
    if not args or not isinstance(args[0], Tensor):
        raise TypeError("example_inputs must start with the tensor x")
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
    ) -> None:
        super().__init__()
        self.original = model
        self.weights = weights
        self.dtype, self.without, self.max_networks = dtype, tuple(without), max_networks
        self.timesteps: list[int] = []
        self._networks: OrderedDict[Any, Network | _Exchanged] = OrderedDict()
        self._workspace = Workspace()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model(x, t, **condition)``.

        Where a gradient with respect to an input is wanted, the original runs: the compiled
        networks have none.

        Raises `WeightsChanged` after a weight was changed.
        """
        leaves, _ = _flatten(args, kwargs)
        if torch.is_grad_enabled() and any(
            isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves
        ):
            return self.original(*args, **kwargs)
        with torch.no_grad():
            network = self._network(args, kwargs)
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

        Raises ValueError for a timestep that is negative or above 4095.
        """
        wanted = [int(t) for t in timesteps]
        with torch.no_grad():
            for network in self._networks.values():
                network.prepare(wanted)
        self.timesteps = list(dict.fromkeys([*self.timesteps, *wanted]))

    def refresh(self) -> None:
        """Read the weights again after they were changed (EMA, LoRA) or replaced.

        Packed copies and tables are rewritten in place, so that recorded steps follow. Raises
        `WeightsReleased` where there is nothing to read any more.
        """
        self._refuse_if_released("refresh() reads the weights again")
        for network in self._networks.values():
            network.refresh()

    def check_weights(self) -> None:
        """Raise `WeightsChanged` where a weight is not what the compiled networks hold."""
        for network in self._networks.values():
            self._check(network)

    def explain(self) -> str:
        """Per compiled shape, what every pass matched, and why not the rest."""
        parts = []
        for key, network in self._networks.items():
            lines = [f"inputs                 {_shapes(key)}", *(str(r) for r in network.reports)]
            lines.append(f"memory                 {_held_memory(self.original, network)}")
            parts.append("\n".join(lines))
        if self.timesteps:
            parts.append(f"timesteps              {len(self.timesteps)} announced")
        if self.without:
            parts.append(f"left out               {', '.join(self.without)}")
        return "\n\n".join(parts) or "nothing compiled yet"

    def _check(self, network: Network | _Exchanged) -> None:
        name = network.changed()
        if name is not None:
            raise WeightsChanged(
                f"weight {name!r} was changed after the network was compiled; call refresh()"
            )

    def _network(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Network | _Exchanged:
        leaves, spec = _flatten(args, kwargs)
        key = (spec, tuple(_key(leaf) for leaf in leaves))
        network = self._networks.get(key)
        if network is None:
            self._refuse_if_released(f"inputs of {_shapes(key)} need the weights again")
            # nothing of this belongs into a step that is being recorded
            with _disable_current_modes(), _fakeness(leaves):
                network = self._build(args, kwargs)
            self._networks[key] = network
            while len(self._networks) > self.max_networks:
                self._networks.popitem(last=False)
        self._networks.move_to_end(key)
        return network

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Network | _Exchanged:
        network: Network | _Exchanged
        with _evaluating(self.original):
            try:
                ordered = dict(sorted(kwargs.items()))
                network = Network(
                    self.original,
                    args,
                    ordered,
                    self.dtype,
                    self.without,
                    self.weights,
                    self._workspace,
                )
            except CannotTrace as reason:
                network = _Exchanged(self.original, args, kwargs, self.dtype, str(reason))
        network.prepare(self.timesteps)
        return network

    def _refuse_if_released(self, what: str) -> None:
        if _released(self.original):
            runs = " or ".join(_shapes(key) for key in self._networks) or "nothing"
            raise WeightsReleased(
                f"{what}, which weights='released' has freed; compiled for {runs}"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_if_released("a copy or pickle compiles from the weights again")
        return {**self.__dict__, "_networks": OrderedDict()}


class _Exchanged:
    """The fallback with the interface of a `Network`: the modules run, some of them exchanged."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype | None,
        reason: str,
    ) -> None:
        self._source, self._dtype = model, dtype
        device = next((v.device for v in _flatten(args, kwargs)[0] if isinstance(v, Tensor)), None)
        self._names = list(dict(sorted(kwargs.items())))
        self._spec = _flatten(args, kwargs)[1]
        self.model, report = with_fused_norms(model)
        self.model.eval()
        report.note = f"no graph: {reason}"
        self.reports = [report]
        if dtype is not None and device is not None and not has_instructions(device, dtype):
            self._stay_in_float32(f"no instructions for {dtype} on this CPU")

    def __call__(self, leaves: Sequence[Any]) -> Any:
        args, named = pytree.tree_unflatten(list(leaves), self._spec)
        if self._dtype is None:
            return self.model(*args, **dict(named))
        x = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        try:
            with torch.autocast(x.device.type, self._dtype):
                result = self.model(*args, **dict(named))
        except Exception as error:  # a layer may lack any dtype, in any way
            result = self.model(*args, **dict(named))  # what is wrong without it too is the model's
            self._stay_in_float32(f"{type(error).__name__} in {self._dtype}")
            return result
        return pytree.tree_map(
            lambda v: v.to(x.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v,
            result,
        )

    def _stay_in_float32(self, why: str) -> None:
        self._dtype = None
        self.reports[0].note += f"; the network runs in float32: {why}"

    def prepare(self, timesteps: Iterable[int]) -> None:
        """There is no table."""

    def refresh(self) -> None:
        """Take over replaced parameters; changed ones are shared already."""
        self.model = with_fused_norms(self._source)[0].eval()

    def nbytes(self) -> int:
        """Nothing is held beside the parameters of the original."""
        return 0

    def changed(self) -> None:
        """Parameters are shared with the original, so that they never differ."""


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of the arguments, keyword arguments in the order of their names."""
    ordered = dict(sorted(kwargs.items())) if len(kwargs) > 1 else kwargs
    return pytree.tree_flatten((args, ordered))


def _key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return type(leaf), leaf


def _fakeness(leaves: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """The mode of fake tensors among ``leaves``: what is made for them must be fake too."""
    fakes = (leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    return next(fakes, contextlib.nullcontext())


def _shapes(key: Any) -> str:
    return ", ".join(_described(part) for part in key[1])


def _held_memory(model: nn.Module, network: Network | _Exchanged) -> str:
    """What is held for a network: constants of its own, and the model's weights, where they are."""
    weights = [*model.parameters(), *model.buffers()]
    freed = sum(w.nbytes for w in _released(model))
    files = Files()
    filed = sum(w.nbytes for w in weights if w in files)
    text = f"{network.nbytes() / _MB:.1f} MB packed and tabulated"
    text += f"; model {(sum(w.nbytes for w in weights) - freed - filed) / _MB:.1f} MB"
    text += f", {filed / _MB:.1f} MB in a file" if filed else ""
    text += f", {freed / _MB:.1f} MB released" if freed else ""
    note = network.weights.note if isinstance(network, Network) else ""
    return f"{text} ({note})" if note else text


def _released(model: nn.Module) -> list[Tensor]:
    return [w for w in (*model.parameters(), *model.buffers()) if isinstance(w, Released)]


_MB = 1 << 20


def _described(part: Any) -> str:
    if isinstance(part, tuple) and len(part) == 3:
        return f"{list(part[0])} {str(part[1]).removeprefix('torch.')}"
    return repr(part[1]) if isinstance(part, tuple) else "..."


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards back in its own."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
