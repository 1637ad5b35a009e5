"""The cache of programs: one per layout, with its captured steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from stepfuse.engine.capture import Captured, CaptureRefused, CudaGraph, Recording, check_replay
from stepfuse.engine.denoiser import Denoiser
from stepfuse.engine.passes.python_state import PythonState
from stepfuse.engine.program import Layout, Program
from stepfuse.engine.request import Part
from stepfuse.kernels.checks import as_integer, shown

GraphMode = Literal["auto", "step", "loop"]
Build = Callable[[Layout, Part], Program]


class Runner:
    """A program with its captured steps, at most one with and one without guidance."""

    def __init__(self, program: Program, graph: GraphMode | None, counts: Counter[str]) -> None:
        self.program, self.graph, self.counts = program, graph, counts
        self.captured: dict[tuple[bool, int], Captured] = {}
        self.refused = "" if graph is not None else "not asked for (graph=None)"
        self._weights = program.denoiser.fingerprint()
        self._state = self._look()
        self._pool: Any = None

    def _look(self) -> PythonState:
        """What the step decides from, beside tensors; tensors are read anew at every replay."""
        roots = {"model": self.program.denoiser.model, "guidance": self.program.guidance}
        return PythonState(roots, contents=False)

    def check_state(self) -> None:
        """Forget what was captured where the Python state that the step read is another now."""
        if self.captured and not self._state.holds():
            self.captured.clear()
            self._state = self._look()
            self._weights = self.program.denoiser.fingerprint()

    def check_weights(self) -> None:
        """RuntimeError where a weight is no longer the tensor that was captured."""
        if self.captured:
            self.program.denoiser.check_weights()
        if self.captured and self._weights != self.program.denoiser.fingerprint():
            raise RuntimeError(
                "the model's weights were replaced after its step was captured; call "
                "sampler.reset(), or update weights in place (tensor.copy_)"
            )

    def run_step(self, guided: bool) -> None:
        """One step: replayed where it could be captured, eager where not."""
        captured = self._capture(guided)
        self._count(captured, 1)
        if captured is None:
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
        program = self.program

        def step() -> None:
            program.advance(guided)

        with program.kept():
            if program.x.device.type == "cuda":
                graph = CudaGraph(step, repeat, self._pool)
                self._pool = graph.graph.pool()
                return graph
            recording = Recording(step)
            # another timestep than the one recorded: a frozen branch shows there
            program.step.fill_(program.rows - 1)
            check_replay(recording, step, program.state(), (program.x, program.x0))
            return recording


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

    def get(self, part: Part) -> Runner:
        """The runner for a part's layout, built where there is none."""
        layout = Layout.of(part, self._denoiser)
        runner = self._runners.pop(layout, None)
        if runner is None:
            runner = Runner(self._build(layout, part), self._graph, self._counts)
        self._runners[layout] = runner
        while len(self._runners) > self._limit:
            del self._runners[next(iter(self._runners))]
            self._counts["evictions"] += 1
        runner.check_state()
        runner.check_weights()
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
