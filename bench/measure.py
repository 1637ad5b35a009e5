"""One run of `stepfuse bench`: build, verify, time in turn, and keep what has been measured."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from stepfuse.bench.able import described
from stepfuse.bench.candidates import Entry
from stepfuse.bench.energy import Counter, NoCounter, counter, energy
from stepfuse.bench.loops import Loop, SamplerLoop
from stepfuse.bench.machine import busy, describe
from stepfuse.bench.memory import PROCESSES, Launch, cold_start
from stepfuse.bench.neighbours import MOST, neighbours, noted
from stepfuse.bench.processes import ProcessFailed
from stepfuse.bench.record import Candidate, Energy, Record, Runs, Settings, Windows
from stepfuse.bench.step_split import split
from stepfuse.bench.tf32 import NOTE, tf32_off
from stepfuse.bench.throughput import throughput
from stepfuse.bench.timing import LEAST_ROUNDS, Turns, Work, timer_for
from stepfuse.bench.verify import Reference
from stepfuse.bench.workload import Workload

WORTH_SAYING = 300.0  # seconds that a figure takes at least
STEPS_ROUNDS = 7  # rounds of each other number of steps: a line through medians needs no more


def other_steps(steps: int) -> list[int]:
    """Fewer steps, for time over steps: a quarter and half as many."""
    return sorted({max(1, steps // 4), max(1, steps // 2)} - {steps})


class Watch(Protocol):
    """What is told how far it is."""

    def stage(self, text: str, total: int | None = None) -> None:
        """Something begins that has ``total`` ticks, or an unknown number."""

    def tick(self) -> None:
        """One more is done."""

    def say(self, text: str) -> None:
        """Something to be read now."""


@dataclass(frozen=True)
class Plan:
    """How much is measured; raises ValueError for numbers out of range.

    Attributes:
        batches: batch sizes. The first is also that of time over steps, energy, time split and
            cold start.
        rounds: most samples of a figure.
        time_limit: seconds for all rounds together; None for no limit.
        processes: most fresh processes for cold start and memory; 0 leaves both out.
        busy: processes that compute beside every candidate while it is timed.
    """

    batches: tuple[int, ...] = (1,)
    rounds: int = 15
    time_limit: float | None = None
    processes: int = PROCESSES
    busy: int = 0

    def __post_init__(self) -> None:
        if not self.batches:
            raise ValueError("--batch must name at least one batch size; got none")
        for batch in self.batches:
            if batch < 1:
                raise ValueError(f"--batch must be at least 1; got {batch}")
        if len(set(self.batches)) != len(self.batches):
            raise ValueError(f"--batch must not name a size twice; got {list(self.batches)}")
        if self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1; got {self.rounds}")
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise ValueError(f"--time-limit must be above 0 and finite; got {self.time_limit:g}")
        if self.processes < 0:
            raise ValueError(f"cold starts must be at least 0; got {self.processes}")
        if not 0 <= self.busy <= MOST:
            raise ValueError(f"--busy must be in 0..{MOST}; got {self.busy}")


@dataclass
class Budget:
    """The time limit, shared out among the figures that are still to come."""

    seconds: float | None
    figures: int

    def share(self) -> float | None:
        """For the next figure."""
        return None if self.seconds is None else max(self.seconds, 0.0) / max(self.figures, 1)

    def spent(self, seconds: float) -> None:
        """On one figure."""
        self.figures -= 1
        if self.seconds is not None:
            self.seconds -= seconds


@dataclass
class Bench:
    """A run.

    Args:
        workload: what is run.
        entries: who takes part, in order.
        plan: how much is measured.
        watch: is told how far it is.
        save: is handed the record after every figure, so that a crash leaves what there is.
        command: as it was typed.
        launch: starts a fresh process; for tests.
    """

    workload: Workload
    entries: Sequence[Entry]
    plan: Plan
    watch: Watch
    save: Callable[[Record], None] = lambda record: None
    command: str = ""
    launch: Launch | None = None
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        spec, plan = self.workload.spec, self.plan
        machine = describe(self.workload.device)
        self.record = Record(
            kind="sampler",
            machine=machine,
            command=self.command,
            complete=False,
            notes=[
                note for note in (busy(machine), noted(plan.busy), self._precision_note()) if note
            ],
            settings=Settings(
                model=spec.model,
                parameters=self.workload.parameters,
                shape=list(self.workload.shape),
                condition=self.workload.condition_in_words(),
                steps=spec.steps,
                num_train_timesteps=self.workload.schedule.num_train_timesteps,
                method=spec.method,
                spacing=spec.spacing,
                eta=spec.eta,
                prediction_type=self.workload.prediction_type,
                seed=spec.seed,
                backend=self.workload.backend,
                graph=spec.graph,
                optimize=spec.optimize,
                dtypes=list(dict.fromkeys(e.dtype for e in self.entries)),
                batches=list(plan.batches),
                rounds=plan.rounds,
                time_limit=plan.time_limit,
            ),
            candidates=[e.described(spec) for e in self.entries],
        )
        for e in self.entries:
            reason = e.why_not(self.workload)
            if reason:
                self._leave_out(self.record.candidate(e.name), "install", reason)
        figures = 2 * len(plan.batches) + len(other_steps(spec.steps))
        self._budget = Budget(plan.time_limit, figures)
        self._timer, self._uncounted = timer_for(self.workload.device)
        self._counter = self._find_counter()

    def run(self) -> Record:
        """Measure everything. Ctrl-C ends it with what there is, ``complete`` False.

        Other exceptions pass, after the record so far was saved.
        """
        try:
            with tf32_off(self.workload.device):
                for batch in self.plan.batches:
                    if batch != self.plan.batches[0]:
                        gc.collect()  # networks hold themselves in circles
                    self._batch(batch)
            self._cold_starts()
            self.record.complete = True
        except KeyboardInterrupt:
            self.record.notes.append("Interrupted: what had been measured by then is here.")
        except Exception as error:
            self.record.notes.append(f"Ended by {described(error)}")
            raise
        finally:
            self._drop_empty()
            self.save(self.record)
        return self.record

    def _precision_note(self) -> str:
        return NOTE if self.workload.device.type == "cuda" else ""

    def _batch(self, batch: int) -> None:
        """Everything at one batch size."""
        loops = self._verified(self._built(batch), batch)
        if not loops:
            return
        samples = {name: self._new_runs(name, batch) for name in loops}
        what = f"batch {batch}: timing {len(loops)} candidates in turn"
        with neighbours(self.plan.busy):
            self._latency(f"{what}, one loop at a time", self.plan.rounds, loops, samples)
            self._throughput(loops, samples, batch, what)
            if batch == self.plan.batches[0]:
                self._over_steps(loops, batch)
                if not self.plan.busy:  # a counter counts theirs, too
                    self._energy(loops, batch)
                self._splits(loops, batch)
        for loop in loops.values():
            self._note_refused(loop)

    def _built(self, batch: int) -> dict[str, Loop]:
        live = [e for e in self.entries if not self.record.candidate(e.name).failure]
        loops: dict[str, Loop] = {}
        for e in live:
            self.watch.stage(f"batch {batch}: building {e.name}")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    loops[e.name] = e.build(self.workload, batch)
            except Exception as error:  # of whatever library it is
                candidate, reason = self.record.candidate(e.name), described(error)
                if candidate.latency:
                    self._note(f"{e.name} could not be built for batch {batch}: {reason}")
                else:
                    self._leave_out(candidate, "build", reason)
        return loops

    def _verified(self, loops: dict[str, Loop], batch: int) -> dict[str, Loop]:
        self.watch.stage(f"batch {batch}: images of the eager float32 loop, to compare with")
        reference = Reference(self.workload, batch)
        reference.images("philox")
        passed = {}
        seconds = 0.0
        for name, loop in loops.items():
            candidate = self.record.candidate(name)
            self.watch.stage(f"batch {batch}: verifying the images of {name}")
            start = time.perf_counter()
            try:
                found, reason = reference.check(loop, candidate.dtype)
            except Exception as error:
                found, reason = None, described(error)
            seconds += time.perf_counter() - start
            if found and (candidate.verified is None or found.worse_than(candidate.verified)):
                candidate.verified = found
            if reason:
                # nothing of a candidate that is wrong anywhere is shown
                candidate.latency.clear()
                candidate.over_steps.clear()
                candidate.throughput.clear()
                candidate.energy = candidate.split = None
                self._leave_out(candidate, "verify", reason)
            else:
                passed[name] = loop
        if LEAST_ROUNDS * seconds > WORTH_SAYING:
            least = LEAST_ROUNDS * seconds / 60
            self.watch.say(
                f"batch {batch}: {LEAST_ROUNDS} rounds, the least, take up to {least:.0f} minutes; "
                "fewer --steps or smaller --batch take less"
            )
        return passed

    def _throughput(
        self, loops: dict[str, Loop], samples: dict[str, list[float]], batch: int, what: str
    ) -> None:
        windows = {name: Windows(batch, self.workload.spec.steps, [], []) for name in loops}
        for name, window in windows.items():
            self.record.candidate(name).throughput.append(window)
        turns = throughput(loops, samples, windows, self._timer)
        self._figure(f"{what}, loops one after the other", self.plan.rounds, turns)

    def _over_steps(self, loops: dict[str, Loop], batch: int) -> None:
        steps = self.workload.spec.steps
        for fewer in other_steps(steps):
            samples: dict[str, list[float]] = {}
            for name, loop in loops.items():
                runs = Runs(batch, fewer, [])
                self.record.candidate(name).over_steps.append(runs)
                samples[name] = runs.seconds
                loop.prepare(fewer)
                loop.images()
            text = f"batch {batch}: timing with {fewer} of the {steps} steps"
            self._latency(text, min(self.plan.rounds, STEPS_ROUNDS), loops, samples)
        for loop in loops.values():
            loop.prepare(steps)

    def _energy(self, loops: dict[str, Loop], batch: int) -> None:
        found = self._counter
        device = self.workload.device
        for name, loop in loops.items():
            candidate = self.record.candidate(name)
            if isinstance(found, str):
                candidate.energy = Energy(reason=found)
                continue
            self.watch.stage(f"batch {batch}: energy of {name}")
            context = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with context:
                wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
                candidate.energy = energy(loop, batch, found, wait)
        self.save(self.record)

    def _splits(self, loops: dict[str, Loop], batch: int) -> None:
        if self.workload.device.type != "cpu":
            self._note("The time split was left out: its clock is one of the CPU.")
            return
        for name, loop in loops.items():
            self.watch.stage(f"batch {batch}: network, update and rest of {name}")
            self.record.candidate(name).split = split(loop, self.workload, batch)
        self.save(self.record)

    def _cold_starts(self) -> None:
        live = [c for c in self.record.candidates if not c.failure]
        spec = replace(self.workload.spec, threads=self.record.machine.threads)
        if self.plan.processes and self.workload.device.type != "cpu":
            self._note("Peak memory is that of the host, not that of the GPU.")
        for c in live if self.plan.processes else []:
            self.watch.stage(f"cold start and memory of {c.name}, in new processes")
            try:
                batch = self.plan.batches[0]
                c.cold_start = cold_start(spec, c.name, batch, self.plan.processes, self.launch)
            except ProcessFailed as error:
                self._note(f"No cold start of {c.name}: {error}")
            self.save(self.record)

    def _latency(
        self, text: str, most: int, loops: dict[str, Loop], into: dict[str, list[float]]
    ) -> None:
        """The seconds of each candidate's whole loop, one at a time."""
        works = {name: Work(loop.images, wake=loop.wake) for name, loop in loops.items()}
        settings = {"uncounted": self._uncounted, "timer": self._timer, "seconds": into}
        self._figure(text, most, Turns(works, settle=True, **settings))

    def _figure(self, text: str, most: int, turns: Turns) -> None:
        """One figure of all candidates, within its share of the time limit."""
        self.watch.stage(text, most)
        start = time.perf_counter()
        turns.run(most, self._budget.share(), self.watch.tick)
        self._budget.spent(time.perf_counter() - start)
        self.save(self.record)

    def _new_runs(self, name: str, batch: int) -> list[float]:
        runs = Runs(batch, self.workload.spec.steps, [])
        self.record.candidate(name).latency.append(runs)
        return runs.seconds

    def _find_counter(self) -> Counter | str:
        try:
            return counter(self.workload.device)
        except NoCounter as reason:
            return str(reason)

    def _note_refused(self, loop: Loop) -> None:
        if isinstance(loop, SamplerLoop) and "refused" in (said := loop.sampler.explain()):
            line = next(line for line in said.splitlines() if "refused" in line)
            self._note(f"The step of stepfuse could not be captured: {' '.join(line.split())}")

    def _note(self, text: str) -> None:
        if text not in self.record.notes:
            self.record.notes.append(text)
            self.watch.say(text)

    def _leave_out(self, candidate: Candidate, doing: str, reason: str) -> None:
        candidate.failure, candidate.failed_at = reason, doing
        self.watch.say(f"{candidate.name} is left out: {reason}")

    def _drop_empty(self) -> None:
        """Figures that were begun and have no sample."""
        for c in self.record.candidates:
            c.latency = [runs for runs in c.latency if runs.seconds]
            c.over_steps = [runs for runs in c.over_steps if runs.seconds]
            c.throughput = [windows for windows in c.throughput if windows.seconds]
