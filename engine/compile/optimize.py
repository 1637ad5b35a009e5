"""`optimize`: any U-Net in, the same function out, compiled by a few passes over its graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from stepfuse.engine.compile import calls
from stepfuse.engine.compile.captured import Captures, GraphMode
from stepfuse.engine.compile.compiled import Compiled
from stepfuse.engine.compile.graph import Pass, PassReport
from stepfuse.engine.compile.held_memory import held_memory
from stepfuse.engine.compile.listening import Ran, tell
from stepfuse.engine.compile.method import as_module
from stepfuse.engine.compile.network import Settings
from stepfuse.engine.compile.network_cache import RESTLESS, NetworkCache
from stepfuse.engine.compile.numbered import Numbered
from stepfuse.engine.compile.pass_order import PASSES, PickledPasses, as_passes
from stepfuse.engine.compile.stages import STAGES, Stage
from stepfuse.engine.compile.weights.watched import Holding
from stepfuse.kernels.arguments import (
    as_call,
    as_integers,
    check_literal,
    check_precision,
    check_words,
)
from stepfuse.kernels.checks import as_integer, check_flag, received, shown

_NOTHING = "nothing compiled yet"


class WeightsChanged(RuntimeError):
    """A weight is not what it was when the network was compiled; ``refresh`` reads it again."""


def optimize(
    model: nn.Module | Callable[..., Any],
    example_inputs: Sequence[Any],
    dtype: torch.dtype | None = None,
    *,
    passes: Sequence[Pass] = PASSES,
    without: Collection[str] = (),
    timesteps: Iterable[int] = (),
    max_networks: int = 8,
    weights: Holding = "parked",
    graph: GraphMode | None = "auto",
    has_timestep: bool = True,
) -> Optimized:
    """Compile ``model(x, t, **condition)`` for inference: same arguments, same result, faster.

        unet = UNet2DModel.from_pretrained("google/ddpm-cifar10-32")        # of diffusers
        fast = optimize(unet, (torch.randn(1, 3, 32, 32), torch.tensor([0])), torch.bfloat16)

        fast(x, t).sample                # as unet(x, t).sample
        print(fast.explain())            # what was fused, and why not the rest

    A model without a timestep is compiled as well, and so is a method:

        decode = optimize(vae.decode, (latents,))                     # decode(latents).sample
        encode = optimize(text_encoder, (tokens,))                    # tokens int [N, L]

    Args:
        model: an nn.Module, or a method of one; neither it nor the values of its weights are
            changed (where they are: see ``weights``), and its dropout is off here.
        example_inputs: (x, t, ...) as the model takes them, x [N, ...], t [N]; a dict at the end
            holds keyword arguments. Compiled for these shapes now, for others when they come.
        dtype: torch.bfloat16 (or float16) for convolutions, linear layers and attention; inputs and
            outputs keep the model's own dtype. What does not run in it on this machine is left in
            float32, as `Optimized.explain` tells. None computes in the model's dtype.
        passes: what rewrites the graph, in this order; ``PASSES + (mine,)`` adds one of your own, a
            function ``mine(gm, context) -> PassReport`` (docs/extending.md).
        without: names of passes to leave out.
        timesteps: to be announced at once, see `Optimized.prepare`.
        max_networks: how many shapes stay compiled, the least recently used one going first. Those
            that run in a captured step of a sampler stay beside them, as long as the step does.
        weights: what becomes of a weight of ``model`` once it is packed, so that it is not held
            twice.

            "parked" moves it to an unnamed file in the temporary folder (``TMPDIR``), from where
            whatever asks for it reads it: the model itself, `Optimized.refresh`, state_dict, copies
            and new shapes work as ever. A tensor that somebody else holds, too, stays where it is,
            and all do where no folder has twice the space; `Optimized.explain` tells. Linux.
            On CUDA weights stay where they are, and filters that are read channels-last are laid
            out so in place of having a copy beside them: the values are the same, the strides of
            the parameter are not. The model itself may take another kernel for it, and a file
            format may ask for its ``contiguous()``, as safetensors' ``save_file`` does.

            "released" frees it. Only these shapes run then; whatever needs a freed weight raises
            `WeightsReleased`.

            "kept" leaves it in memory as it is, and gives packed weights as much more of it as
            makes them faster: that saves up to a seventh of the time in float32, next to nothing in
            bfloat16. With the other two the process peaks no higher than where the model itself
            runs (measured on the CPU, in bench/NOTES.md); on CUDA, "parked" holds what ``dtype``
            lowers twice.
        graph: "auto" captures a network on CUDA as one CUDA graph when it is first called, and
            replays it: the host launches it as a whole, on copies of the arguments, and the results
            are copies too. It holds the memory that one evaluation takes. A network that draws
            random numbers or writes to a weight, and a call whose operators somebody else records,
            run operator by operator; `Optimized.explain` tells. None captures nothing. On the CPU
            nothing is captured.
        has_timestep: whether the second argument, where there is one, is the timestep: [N], a
            tensor without dimensions or a number. False for a model that has none: what follows x
            there is an argument like any other, and ``timesteps`` must be empty.

    The values of the model stay bitwise what they are, whatever happens, and a mirror of it is
    traced. Strides that were changed are put back where compiling fails. A change of its
    weights is noticed, and so is one of the Python state that its forward reads (the scale of an
    adapter, which one is active, a method put over another): each such state has its networks, and
    on the CPU each number of threads too.

    Raises TypeError or ValueError for arguments that cannot be meant, and what the model itself
    raises for them. A pass that fails is left out and named; a model that cannot be traced has its
    GroupNorms exchanged instead, and `Optimized.explain` says why.
    """
    module = as_module("model", model)
    check_precision("dtype", dtype)
    passes = as_passes(passes)
    if not passes and isinstance(without, (tuple, list)) and without:
        raise ValueError(f"without must be empty where passes is; got {without!r}")
    without = check_words("without", without, [pass_.__name__ for pass_ in passes])
    check_literal("weights", weights, Holding)
    if graph is not None and not (isinstance(graph, str) and graph in get_args(GraphMode)):
        raise ValueError(f"graph must be 'auto' or None; got {shown(graph)}")
    max_networks = as_integer("max_networks", max_networks)
    if max_networks < 1:
        raise ValueError(f"max_networks must be at least 1; got {max_networks}")
    check_flag("has_timestep", has_timestep)
    lower = None if dtype is torch.float32 else dtype
    fast = Optimized(
        module, lower, without, max_networks, weights, (), passes, graph, bool(has_timestep)
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
        passes: Sequence[Pass] = PASSES,
        graph: GraphMode | None = "auto",
        has_timestep: bool = True,
    ) -> None:
        super().__init__()
        self.original = model
        self.weights, self.passes, self.graph = weights, tuple(passes), graph
        self.dtype, self.without, self.max_networks = dtype, tuple(without), max_networks
        self.timesteps: list[int] = []
        self.has_timestep = has_timestep
        self._never_counts = frozenset(ignored)  # paths of `PythonState`
        self._forget()

    def _forget(self) -> None:
        """Nothing is compiled, and nothing is known of the model."""
        settings = Settings(self.dtype, self.passes, self.without, self.weights, self.has_timestep)
        self._cache = NetworkCache(
            self.original, settings, self.max_networks, self.timesteps, self._never_counts
        )
        self._captures = Captures(self.graph)

    @property
    def networks(self) -> list[Compiled | Numbered]:
        """What is compiled so far, the last in the order of use at the end."""
        return self._cache.networks

    @property
    def reports(self) -> list[PassReport]:
        """What the passes did, for one network after the other."""
        return [report for network in self.networks for report in network.reports]

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
            call, network, leaves = self._cache.find(args, kwargs)
            tell(Ran(self, self._cache, call, network, network.moves))
            self._check(network)
            return self._captures(network, leaves)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile for the shapes of these arguments, if that has not been done."""
        with torch.no_grad():
            self._cache.find(args, kwargs)

    def prepare(self, timesteps: Iterable[int]) -> None:
        """Announce timesteps: what depends on them alone becomes a row of a table.

        On the CPU other timesteps still work, by computing it, except in a step that was recorded
        (a captured sampler) after this call: that reads the table only, and raises IndexError for a
        timestep that was not announced. On CUDA nobody looks at the timestep: once some were
        announced, any other gives NaN. The table there has the announced rows, twice as many at
        least when it has to grow; what was captured is captured again then.

        Raises TypeError for what is no whole number, ValueError for a timestep that is negative or
        above 4095.
        """
        wanted = as_integers("timesteps", timesteps, "a list of indices", ordered=False)
        if wanted and min(wanted) < 0:
            raise ValueError(f"timesteps must be at least 0; got {min(wanted)}")
        if wanted and not self.has_timestep:
            raise ValueError(f"timesteps must be empty with has_timestep=False; got {wanted[:20]}")
        with self._cache.changing():
            for network in self.networks:
                network.prepare(wanted)
            self.timesteps[:] = dict.fromkeys([*self.timesteps, *wanted])

    def refresh(self) -> None:
        """Read the weights again after they were changed (EMA, LoRA) or replaced.

        Packed copies and tables are rewritten in place, so that recorded steps follow. Networks of
        another state of the model are compiled again when it comes back to that. Raises
        `WeightsReleased` where there is nothing to read any more.
        """
        self._cache.refresh()

    def check_weights(self) -> None:
        """Raise `WeightsChanged` where a weight is not what the compiled networks hold."""
        with self._cache.lock:
            for network in self._cache.current():
                self._check(network)

    def watched_instead(self) -> tuple[Any, ...]:
        """Whose Python state decides what this computes."""
        return (self.original,)

    def explain(self, graph: bool | Stage = False) -> str:
        """Per compiled shape, what every pass matched, and why not the rest.

        Args:
            graph: the calls of one stage instead, a line each: the result, its shape and dtype, the
                operator with its arguments, and the pass that wrote it. "main" (or True) is what
                runs in every evaluation, "time" what depends on the timestep alone, "weights" what
                runs when a network is built and at `refresh`.

        Raises TypeError or ValueError for another ``graph``.
        """
        if graph is not False:
            return self._graph("main" if graph is True else graph)
        parts = []
        for inputs, network in self._cache.described():
            lines = [f"inputs                 {inputs}", *(str(r) for r in network.reports)]
            lines.append(f"memory                 {held_memory(self.original, network)}")
            captured = self._captures.described(network)
            if captured:
                lines.append(f"graph                  {captured}")
            parts.append("\n".join(lines))
        if self.timesteps:
            parts.append(f"timesteps              {len(self.timesteps)} announced")
        restless = self._cache.restless()
        if restless:
            parts.append(
                f"as it is               {', '.join(restless)} changed {RESTLESS} times: for "
                "other values the model itself runs"
            )
        if self.without:
            parts.append(f"left out               {', '.join(self.without)}")
        return "\n\n".join(parts) or _NOTHING

    def _graph(self, stage: Stage) -> str:
        known = isinstance(stage, str)
        if not known or stage not in STAGES:
            accepted, wrong = ", ".join(map(repr, STAGES)), ValueError if known else TypeError
            raise wrong(f"graph must be True, False or one of {accepted}; got {received(stage)}")
        parts = [
            f"inputs                 {inputs}\n{network.listed(stage)}"
            for inputs, network in self._cache.described()
        ]
        return "\n\n".join(parts) or _NOTHING

    def _check(self, network: Compiled | Numbered) -> None:
        name = network.changed()
        if name is not None:
            raise WeightsChanged(
                f"weight {name!r} was changed after the network was compiled; call refresh()"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._cache.refuse_if_released("a copy or pickle compiles from the weights again")
        own = ("_cache", "_captures")
        state = {name: v for name, v in self.__dict__.items() if name not in own}
        return {**state, "passes": PickledPasses(self.passes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {"passes": state["passes"].passes, "timesteps": list(state["timesteps"])}
        super().__setstate__({**state, **own})  # type: ignore[no-untyped-call]
        self._forget()


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The type of device of the first tensor among the arguments."""
    found = (v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return next(found, "cpu")
