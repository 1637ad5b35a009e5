"""What a sampler is going to do: its timesteps, its update and its guidance, as one table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from stepfuse.engine.sampling.copies import Copyable
from stepfuse.engine.sampling.fixed import Fixed
from stepfuse.engine.sampling.guidance.protocol import Guidance, Steering, check_guidance
from stepfuse.engine.sampling.plan import Plan, step_table
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import Spacing, check_timesteps, spaced_timesteps
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
    timesteps: list[int]
    plan: Plan
    _guidance: Guidance | None
    _asked: list[int]  # timesteps, which the rows of a method may repeat or leave out

    def set_timesteps(
        self,
        steps: int | str = 50,
        spacing: Spacing = "leading",
        steps_offset: int = 0,
        *,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
    ) -> None:
        """Another table for the same sampler: captured steps are kept, since they only read it.

        Arguments as in the constructor; ``eta=None`` keeps eta.
        """
        update = self.update if eta is None else replace(self.update, eta=eta)
        self._plan(update, self._chosen(steps, spacing, steps_offset, timesteps), self.guidance)

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
        self, steps: int | str, spacing: Spacing, offset: int, timesteps: Sequence[int] | None
    ) -> list[int]:
        total = self.schedule.num_train_timesteps
        if timesteps is not None:
            return check_timesteps(timesteps, total)
        return spaced_timesteps(total, steps, spacing, offset)

    def _plan(self, update: Update, timesteps: list[int], guidance: Guidance | None) -> None:
        """All that follows from these three, at once, or nothing where they do not fit together."""
        table = step_table(self.schedule, timesteps, update)
        self._follow(Plan.of(table, guidance, update.shifts_mean), update, guidance)
        vars(self)["_asked"] = timesteps

    def _look_at_guidance(self) -> None:
        """Write its scales into the plan again where it has others now."""
        steering = self.steering
        if steering is not None:
            now = steering.rows(self.plan.timesteps)
            if now != (self.plan.scales, self.plan.guided):
                plan = Plan.of(self.plan.table, steering, self.mean_guidance)
                self._follow(plan, self.update, self._guidance)

    @abstractmethod
    def _follow(self, plan: Plan, update: Update, guidance: Guidance | None) -> None:
        """Let these be in force."""
