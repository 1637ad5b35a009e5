"""The cache of programs: one per layout, with its captured steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args
from weakref import WeakSet

import torch
from torch import Tensor

from stepfuse.engine.compile.listening import Ran, listening
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.state.values import setting_key
from stepfuse.engine.replay.capture import (
    Captured,
    CaptureRefused,
    Recording,
    Step,
    check_replay,
)
from stepfuse.engine.replay.cuda_graph import CudaGraph
from stepfuse.engine.replay.device_order import DeviceOrder
from stepfuse.engine.sampling.condition import Staged
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.guidance.protocol import Steering
from stepfuse.engine.sampling.plan import Plan
from stepfuse.engine.sampling.program import Layout, Program
from stepfuse.engine.sampling.request import Part
from stepfuse.kernels.checks import as_integer, shown

GraphMode = Literal["auto", "step", "loop"]
Build = Callable[[Layout, Part], Program]
P = TypeVar("P", bound="StaticStep")
_RESTLESS = 8  # changes of one thing after which steps that read it are not captured any more
_MOST_LOOPS = 4  # unrolled graphs of a program


class StaticStep(Protocol):
    """Static buffers and a step over them, as `Runner` captures it."""

    @property
    def denoiser(self) -> Denoiser:
        """Whose model is in the step."""

    @property
    def guidance(self) -> Steering | None:
        """What is in the step beside it."""

    @property
    def staged(self) -> Staged:
        """The buffers of the condition."""

    @property
    def device(self) -> torch.device:
        """Of the buffers."""

    @property
    def uncapturable(self) -> str:
        """Why the step must not be captured; empty where it may be."""

    def advance(self, guided: bool) -> None:
        """Do the step, which has two forms."""

    def state(self) -> tuple[Tensor, ...]:
        """The buffers that a step changes."""

    def outputs(self) -> tuple[Tensor, ...]:
        """Those that a replay must leave as the step itself does."""

    def kept(self) -> AbstractContextManager[None]:
        """Do steps inside and be where it was before on leaving."""

    def to_other_step(self, repeat: int) -> None:
        """Let what comes next be at another timestep, from which ``repeat`` steps can be done."""


@dataclass(frozen=True)
class _Kept:
    """A captured step, and the networks in it, which it pins."""

    step: Captured
    networks: list[Ran]


class Runner(Generic[P]):
    """A program with its captured steps: one with and one without guidance, and whole loops.

    Of the loops, each of another length, the least recently used goes where there are more than
    four.

    A captured step keeps what Python decided when it was captured. Before it is replayed after
    others could change something, `check` compares: the Python state that the step reads, which
    weights it reads and where they lie, the settings of its condition, and the compiled networks in
    it. Where one is not what it was, the step is captured anew.
    """

    def __init__(
        self,
        program: P,
        graph: GraphMode | None,
        counts: Counter[str],
        optimized: WeakSet[Any],
        order: DeviceOrder,
    ) -> None:
        self._optimized, self._order = optimized, order
        self.program, self.graph, self.counts = program, graph, counts
        self._captured: dict[tuple[bool, int], _Kept] = {}  # the one used last at the end
        self.refused = "" if graph is not None else "not asked for (graph=None)"
        self.refused = self.refused or program.uncapturable
        self._changes: Counter[str] = Counter()
        self._pool: Any = None  # of memory, which the graphs share

    def _look(self) -> None:
        """Picture what the step decides from, beside tensors, which are read at every replay."""
        settings = self.program.staged.changeable
        guidance = self.program.guidance
        roots = {
            "model": self.program.denoiser.model,
            "guidance": None if guidance is None else guidance.reads,
            **dict(settings),
        }
        self._state = PythonState(roots, contents=False)
        self._settings = self._setting_keys()
        self._does = None if guidance is None else guidance.does

    def _setting_keys(self) -> dict[str, Hashable]:
        return {name: setting_key(value, name) for name, value in self.program.staged.changeable}

    def _different(self) -> list[str]:
        """What is not as it was when the steps were captured, in words; for a look only."""
        now = self._setting_keys()
        found = [name for name, key in self._settings.items() if now.get(name) != key]
        guidance = self.program.guidance
        if guidance is not None and guidance.does is not self._does:
            found.append("the outputs of the guidance")
        if not self._state.holds():
            found += list(self._state.changes()) or ["its Python state"]
        return found

    def check(self) -> None:
        """Forget what was captured where it may do something else than the step would now.

        What changes again and again is not captured any more.
        """
        if not self._captured:
            return
        changed = self._different()
        kept = self._captured.values()
        if not all(captured.step.holds() for captured in kept):
            changed.append("where tensors of the model lie")
        if not all(network.holds() for captured in kept for network in captured.networks):
            changed.append("what an optimised model in the step computes with")
        if not changed:
            return
        self._forget()
        for name in dict.fromkeys(changed):
            self._changes[name] += 1
            if self._changes[name] > _RESTLESS:
                self.refused = f"{name} changed {self._changes[name]} times between captured steps"

    def _forget(self) -> None:
        if self._captured:
            self._order.finish()
        self._captured.clear()

    def run_step(self, guided: bool) -> None:
        """One step: replayed where it could be captured, eager where not."""
        captured = self._step(guided)
        self._count(captured, 1)
        if captured is None:
            with self._listening():
                self.program.advance(guided)
        else:
            captured.replay()

    def run_loop(self, part: Part, guided: Sequence[bool]) -> bool:
        """All steps as one graph; False, and nothing done, where they must run one by one.

        That is so without graph="loop" and CUDA graphs, with a caller's noise, which is handed over
        between the steps, and where only some steps are guided.
        """
        if self.graph != "loop" or not _has_graphs(self.program.device):
            return False
        if part.noise is not None or len(set(guided)) != 1 or self.refused:
            return False
        captured = self._step(guided[0], repeat=len(guided))
        if captured is None:
            return False
        self._count(captured, len(guided))
        captured.replay()
        return True

    def _count(self, captured: Captured | None, steps: int) -> None:
        self.counts["eager_steps" if captured is None else "replays"] += steps

    def _step(self, guided: bool, repeat: int = 1) -> Captured | None:
        """What does so many steps at once, captured where there is none; None if it is refused."""
        key = (guided, repeat)
        kept = self._captured.pop(key, None)
        if kept is None and not self.refused:
            try:
                kept = self._capture(guided, repeat)
                self.counts["captures"] += 1
            except CaptureRefused as reason:
                self.refused = str(reason)
        if kept is None:
            return None
        self._captured[key] = kept
        self._evict_loops()
        return kept.step

    def _evict_loops(self) -> None:
        loops = [key for key in self._captured if key[1] > 1]
        if len(loops) > _MOST_LOOPS:
            self._order.finish()
            del self._captured[loops[0]]
            self.counts["evictions"] += 1

    def _capture(self, guided: bool, repeat: int) -> _Kept:
        """A capture in which nothing changed that the step decides from.

        What is built at a first call and kept is there when the step is captured again.

        Raises `CaptureRefused` where the step changes its state then, too: a replay would not.
        """
        for _ in range(2):
            if not self._captured:  # what was captured before was compared with the last picture
                self._look()
            with self._listening() as networks:
                captured = self._recorded(guided, repeat)
            changed = self._different()
            if not changed:
                return _Kept(captured, networks)
            self._forget()
        raise CaptureRefused(
            f"the step itself changes {', '.join(dict.fromkeys(changed))}, which a replay would not"
        )

    @contextmanager
    def _listening(self) -> Iterator[list[Ran]]:
        """Inside, the step's own code runs; the optimised models in it are remembered."""
        with listening() as networks:
            try:
                yield networks
            finally:
                self._optimized.update(network.optimized for network in networks)

    def _recorded(self, guided: bool, repeat: int) -> Captured:
        program = self.program

        def step() -> None:
            program.advance(guided)

        def steps() -> None:
            for _ in range(repeat):
                step()

        with program.kept(), _without_cast_weights():
            captured: Captured
            with program.kept():
                captured = (
                    self._graph(step, repeat) if _has_graphs(program.device) else Recording(step)
                )
            program.to_other_step(repeat)  # a branch that was frozen shows there
            try:
                check_replay(captured, steps, program.state(), program.outputs())
            except torch.OutOfMemoryError as error:
                raise CaptureRefused(
                    "no memory to compare a replay with the eager step, which needs as much as the "
                    f"graph: {error}"
                ) from error
            return captured

    def _graph(self, step: Step, repeat: int) -> CudaGraph:
        # a pool that has lost its last graph cannot be used again
        pool = self._pool if self._captured else None
        graph = CudaGraph(step, self.program.device, repeat, pool)
        self._pool = graph.pool
        return graph


def check_graph(graph: Any) -> None:
    """ValueError unless it is a `GraphMode` or None."""
    modes = get_args(GraphMode)
    if graph is not None and not (isinstance(graph, str) and graph in modes):
        raise ValueError(f"graph must be 'auto', 'step', 'loop' or None; got {shown(graph)}")


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


@contextmanager
def _without_cast_weights() -> Iterator[None]:
    """Under autocast, let every use of a weight cast it: a replay would go on with a copy that
    autocast keeps, whatever becomes of the weight.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Programs:
    """At most ``limit`` runners, least recently used thrown out first, each with its own graphs."""

    def __init__(
        self,
        build: Build,
        denoiser: Denoiser,
        graph: GraphMode | None,
        limit: int,
        order: DeviceOrder,
    ) -> None:
        limit = as_integer("max_programs", limit)
        check_graph(graph)
        if limit < 1:
            raise ValueError(f"max_programs must be at least 1; got {limit}")
        self._build, self._denoiser, self._graph, self._limit = build, denoiser, graph, limit
        self._order = order
        self._runners: dict[Layout, Runner[Program]] = {}  # the one used last at the end
        self._counts: Counter[str] = Counter()
        self.optimized: WeakSet[Any] = WeakSet()  # models that ran in a step

    def get(self, part: Part, plan: Plan) -> Runner[Program]:
        """The runner for a part's layout, built where there is none; to be loaded, then checked."""
        layout = Layout.of(part, self._denoiser, plan)
        runner = self._runners.pop(layout, None)
        if runner is None:
            program = self._build(layout, part)
            runner = Runner(program, self._graph, self._counts, self.optimized, self._order)
        self._runners[layout] = runner
        if len(self._runners) > self._limit:
            self._order.finish()
            del self._runners[next(iter(self._runners))]
            self._counts["evictions"] += 1
        return runner

    def clear(self) -> None:
        """Drop every runner."""
        if self._runners:
            self._order.finish()
        self._runners.clear()

    def stats(self) -> dict[str, int]:
        """captures, replays, eager_steps, evictions, programs, bytes (of static buffers)."""
        names = ("captures", "replays", "eager_steps", "evictions")
        runners = list(self._runners.values())  # another thread may be adding one
        return {
            **{name: self._counts[name] for name in names},
            "programs": len(runners),
            "bytes": sum(r.program.nbytes() for r in runners),
        }

    def explain(self, device: torch.device) -> str:
        """Captured or not, and why."""
        if self._graph is None:
            return "none: steps run eagerly (graph=None)"
        reasons = sorted({r.refused for r in list(self._runners.values()) if r.refused})
        if reasons:
            return f"refused, steps run eagerly: {'; '.join(reasons)}"
        kind = "a CUDA graph" if device.type == "cuda" else "a recording of its operations"
        if not self._counts["captures"]:
            return f"{kind}, made at the first step of each shape"
        return f"{kind}; {self._counts['captures']} captured, {self._counts['replays']} replays"
