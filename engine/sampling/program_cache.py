"""The cache of programs: one per layout, with its captured steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch

from stepfuse.engine.compile.listening import Ran, listening
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.state.values import setting_key
from stepfuse.engine.sampling.capture import (
    Captured,
    CaptureRefused,
    CudaGraph,
    Recording,
    check_replay,
)
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.program import Layout, Program
from stepfuse.engine.sampling.request import Part
from stepfuse.kernels.checks import as_integer, shown

GraphMode = Literal["auto", "step", "loop"]
Build = Callable[[Layout, Part], Program]
_RESTLESS = 8  # changes of one thing after which steps that read it are not captured any more


class Runner:
    """A program with its captured steps, at most one with and one without guidance.

    A captured step keeps what Python decided when it was captured. Before it is replayed after
    others could change something, `check` compares: the Python state that the step reads, which
    weights it reads and where they lie, the settings of its condition, and the compiled networks in
    it. Where one is not what it was, the step is captured anew.
    """

    def __init__(
        self,
        program: Program,
        graph: GraphMode | None,
        counts: Counter[str],
        optimized: WeakSet[Any],
    ) -> None:
        self._optimized = optimized
        self.program, self.graph, self.counts = program, graph, counts
        self.captured: dict[tuple[bool, int], Captured] = {}
        self.refused = "" if graph is not None else "not asked for (graph=None)"
        self.refused = self.refused or program.uncapturable
        self.networks: list[Ran] = []  # in the captured steps
        self._changes: Counter[str] = Counter()
        self._pool: Any = None

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
        if not self.captured:
            return
        changed = self._different()
        if not all(captured.holds() for captured in self.captured.values()):
            changed.append("where tensors of the model lie")
        if not all(network.holds() for network in self.networks):
            changed.append("what an optimised model in the step computes with")
        if not changed:
            return
        self._forget()
        for name in dict.fromkeys(changed):
            self._changes[name] += 1
            if self._changes[name] > _RESTLESS:
                self.refused = f"{name} changed {self._changes[name]} times between captured steps"

    def _forget(self) -> None:
        self.captured.clear()
        self.networks.clear()

    def run_step(self, guided: bool) -> None:
        """One step: replayed where it could be captured, eager where not."""
        captured = self._capture(guided)
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
        if self.graph != "loop" or self.program.x.device.type != "cuda":
            return False
        if part.noise is not None or len(set(guided)) != 1 or self.refused:
            return False
        captured = self._capture(guided[0], repeat=len(guided))
        if captured is None:
            return False
        self._count(captured, len(guided))
        captured.replay()
        return True

    def _count(self, captured: Captured | None, steps: int) -> None:
        self.counts["eager_steps" if captured is None else "replays"] += steps

    def _capture(self, guided: bool, repeat: int = 1) -> Captured | None:
        key = (guided, repeat)
        if key not in self.captured and not self.refused:
            try:
                self.captured[key] = self._captured(guided, repeat)
                self.counts["captures"] += 1
            except CaptureRefused as reason:
                self.refused = str(reason)
        return self.captured.get(key)

    def _captured(self, guided: bool, repeat: int) -> Captured:
        """A capture in which nothing changed that the step decides from.

        What is built at a first call and kept is there when the step is captured again.

        Raises `CaptureRefused` where the step changes its state then, too: a replay would not.
        """
        for _ in range(2):
            if not self.captured:  # what was captured before was compared with the last picture
                self._look()
            with self._listening() as networks:
                captured = self._recorded(guided, repeat)
            changed = self._different()
            if not changed:
                self.networks += [network for network in networks if network not in self.networks]
                return captured
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

        with program.kept(), _without_cast_weights():
            if program.x.device.type == "cuda":
                graph = CudaGraph(step, repeat, self._pool)
                self._pool = graph.graph.pool()
                return graph
            recording = Recording(step)
            # another timestep than the one recorded: a frozen branch shows there
            program.step.fill_(program.rows - 1)
            check_replay(recording, step, program.state(), (program.x, program.x0))
            return recording


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
        self, build: Build, denoiser: Denoiser, graph: GraphMode | None, limit: int
    ) -> None:
        limit = as_integer("max_programs", limit)
        modes = get_args(GraphMode)
        if graph is not None and not (isinstance(graph, str) and graph in modes):
            raise ValueError(f"graph must be 'auto', 'step', 'loop' or None; got {shown(graph)}")
        if limit < 1:
            raise ValueError(f"max_programs must be at least 1; got {limit}")
        self._build, self._denoiser, self._graph, self._limit = build, denoiser, graph, limit
        self._runners: dict[Layout, Runner] = {}  # the one used last at the end
        self._counts: Counter[str] = Counter()
        self.optimized: WeakSet[Any] = WeakSet()  # models that ran in a step

    def get(self, part: Part) -> Runner:
        """The runner for a part's layout, built where there is none; to be loaded, then checked."""
        layout = Layout.of(part, self._denoiser)
        runner = self._runners.pop(layout, None)
        if runner is None:
            program = self._build(layout, part)
            runner = Runner(program, self._graph, self._counts, self.optimized)
        self._runners[layout] = runner
        while len(self._runners) > self._limit:
            del self._runners[next(iter(self._runners))]
            self._counts["evictions"] += 1
        return runner

    def clear(self) -> None:
        """Drop every runner."""
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
