"""What a sampler is going to do: its timesteps, its update and its guidance, as one table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from stepfuse.engine.sampling.copies import Copyable
from stepfuse.engine.sampling.fixed import Fixed
from stepfuse.engine.sampling.grids import Grid, choose
from stepfuse.engine.sampling.guidance.protocol import Guidance, Steering, check_guidance
from stepfuse.engine.sampling.methods import Method
from stepfuse.engine.sampling.plan import Plan, step_table
from stepfuse.engine.sampling.points import level_at
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import Spacing
from stepfuse.engine.sampling.update import Update

_BUILD = "build another Sampler"
_TABLE = "call set_timesteps"


class Planned(Copyable, Fixed):
    """The base of `stepfuse.Sampler`: whatever is changed here, the table follows.

    plan = steps(schedule, timesteps, update), with the scales of the guidance written into it
    """

    FIXED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("max_programs", "schedule", "graph", "dtype", "denoiser"), _BUILD),
        **dict.fromkeys(("device", "backend"), _BUILD),
        **dict.fromkeys(("update", "timesteps", "plan"), _TABLE),
    }
    schedule: Schedule
    update: Update
    timesteps: list[float]
    plan: Plan
    _guidance: Guidance | None
    _asked: list[float]  # timesteps, which the rows of a method may repeat or leave out

    def set_timesteps(
        self,
        steps: int | str = 50,
        spacing: Spacing = "leading",
        steps_offset: int = 0,
        *,
        timesteps: Sequence[float] | None = None,
        eta: float | None = None,
        method: str | Method | None = None,
        order: int | None = None,
        solver_type: str | None = None,
        grid: Grid | None = None,
    ) -> None:
        """Another table for the same sampler: captured steps are kept, since they only read it.

        Arguments as in the constructor. ``eta=None`` keeps eta, ``method=None`` the method with its
        order and type, where those are None, too; another method begins with its own. A solver that
        remembers more, or less, needs a step of its own.
        """
        update = self.update if eta is None else replace(self.update, eta=eta)
        if method is not None:
            eta = update.eta if eta is not None else 0.0
            update = replace(
                update, method=method, order=order, solver_type=solver_type, eta=eta, strict=True
            )
        elif order is not None or solver_type is not None:
            update = replace(
                update,
                order=update.order if order is None else order,
                solver_type=update.solver_type if solver_type is None else solver_type,
            )
        chosen = self._chosen(update, steps, spacing, steps_offset, timesteps, grid)
        self._plan(update, chosen, self.guidance)

    @property
    def guidance(self) -> Guidance | None:
        """What steers the samples. It can be assigned, and is in force from the next call on.

        Assigning raises TypeError for what is no guidance, ValueError for one that does not fit the
        table, and RuntimeError while the sampler is busy in this thread.
        """
        return self._guidance

    @guidance.setter
    def guidance(self, guidance: Guidance | None) -> None:
        check_guidance(guidance)
        self._plan(self.update, self._asked, guidance)

    @property
    def steering(self) -> Steering | None:
        """The guidance with what it leaves out filled in."""
        known: Steering | None = vars(self).get("_steering")
        if known is None or not known.is_of(self._guidance):
            known = vars(self)["_steering"] = Steering.of(self._guidance)
        return known

    @property
    def num_function_evaluations(self) -> int:
        """Model evaluations per sample; a guided step of classifier-free guidance has two."""
        self._look_at_guidance()
        steering = self.steering
        guided = 1 if steering is None else steering.evaluations
        return sum(guided if active else 1 for active in self.plan.guided)

    @property
    def mean_guidance(self) -> bool:
        """Whether a classifier's gradient shifts the mean (DDPM) or epsilon (DDIM)."""
        return self.update.shifts_mean

    def _chosen(
        self,
        update: Update,
        steps: int | str,
        spacing: Spacing,
        offset: int,
        timesteps: Sequence[float] | None,
        grid: Grid | None,
    ) -> list[float]:
        """Where steps start; ValueError for what the method cannot do with them."""
        chosen = choose(self.schedule, update, steps, spacing, offset, timesteps, grid)
        if update.order is not None and update.order > len(chosen):
            raise ValueError(
                f"order {update.order} of method {str(update.method)!r} needs as many steps; got "
                f"{len(chosen)}"
            )
        return chosen

    def _plan(self, update: Update, timesteps: list[float], guidance: Guidance | None) -> None:
        """All that follows from these three, at once, or nothing where they do not fit together."""
        table = step_table(self.schedule, timesteps, update)
        self._follow(Plan.of(table, guidance, update.shifts_mean), update, guidance)
        vars(self)["_asked"] = timesteps

    def _plan_since(self, first: int) -> tuple[Plan, int]:
        """A plan that begins with the timestep of that number, and the row of it to begin with.

        That of a solver with a memory is made for the start, where it has nothing to remember yet;
        it keeps as many slots as the whole one.
        """
        plan = self.plan
        if plan.history is None or not first:
            return plan, first
        table = step_table(self.schedule, self._asked[first:], self.update)
        made = Plan.of(table, self._guidance, self.mean_guidance)
        left_out = len(plan.timesteps) - len(made.timesteps)
        return replace(made, slots=plan.slots, left_out=left_out), 0

    def _described(self) -> list[str]:
        """The plan in words, a line for each thing."""
        update, first, last = self.update, self.timesteps[0], self.timesteps[-1]
        eta = f", eta={update.eta:g}" if "eta" in update.solver.takes else ""
        clip = (
            "no clipping" if update.clip_sample is None else f"x0 clipped at {update.clip_sample:g}"
        )
        lines = [
            f"method      {update.method}{update.chosen}{eta}, {update.prediction_type}, {clip}",
            f"schedule    {self.schedule!r}",
            f"table       {len(self.timesteps)} steps, timesteps {first:.7g} .. {last:.7g}",
        ]
        if not self.plan.whole:
            lines.append("network     timesteps are not whole: it computes their embeddings anew")
        if self.plan.slots:
            lines.append(f"history     {self.plan.slots} tensors like x")
        lines.append(f"evaluations {self.num_function_evaluations} per sample")
        lines.append(f"guidance    {self.guidance if self.guidance is not None else 'none'}")
        return lines

    def _whole(self) -> list[int]:
        """The timesteps, for DDIM up and down; ValueError where they are not whole."""
        between = [t for t in self._asked if not isinstance(t, int)]
        if between:
            raise ValueError(
                f"DDIM inversion needs timesteps that are whole; the grid has {between[0]:.6g}"
            )
        return [int(t) for t in self._asked]

    def _level(self, t: float) -> tuple[float, float]:
        """(signal, noise) at a timestep."""
        return level_at(self.schedule, t, self.update.prediction_type)

    def _look_at_guidance(self) -> None:
        """Write its scales into the plan again where it has others now."""
        steering = self.steering
        if steering is not None:
            now = steering.rows(self.plan.timesteps)
            if now != (self.plan.scales, self.plan.guided):
                plan = self.plan.steered(steering, self.mean_guidance)
                self._follow(plan, self.update, self._guidance)

    @abstractmethod
    def _follow(self, plan: Plan, update: Update, guidance: Guidance | None) -> None:
        """Let these be in force."""
