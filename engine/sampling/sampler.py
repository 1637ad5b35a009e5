"""The sampler: a schedule, a table of steps, and a loop over one captured step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from stepfuse.engine.compile.optimize import Optimized
from stepfuse.engine.replay.device_order import DeviceOrder
from stepfuse.engine.sampling.condition import Staged
from stepfuse.engine.sampling.denoiser import Condition, Denoiser, Model, optimized
from stepfuse.engine.sampling.encoding import Encoding
from stepfuse.engine.sampling.grids import Grid
from stepfuse.engine.sampling.guidance.protocol import Guidance, Steering, check_guidance
from stepfuse.engine.sampling.lock import Turn
from stepfuse.engine.sampling.methods import Method
from stepfuse.engine.sampling.plan import Plan, most_rows
from stepfuse.engine.sampling.program import Layout, Program
from stepfuse.engine.sampling.program_cache import GraphMode, Programs, Runner
from stepfuse.engine.sampling.request import Part, Request, check_watching
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.step import Step
from stepfuse.engine.sampling.timesteps import Spacing
from stepfuse.engine.sampling.update import (
    PredictionType,
    Update,
    VarianceAtZero,
    VarianceType,
)
from stepfuse.kernels.arguments import check_kind
from stepfuse.kernels.backends import resolve
from stepfuse.kernels.checks import as_integer, check_dtype


class Sampler(Encoding):
    """Samples from a denoising model by DDPM, DDIM and their family.

        x_T ~ N(0, I);   for each timestep t:   x <- step(x, model(x, t))

    Args:
        model: nn.Module or callable (x, t, **condition) -> tensor or object with ``.sample``; t is
            int64 [N], the index on the training schedule. One whose attribute ``capturable`` is
            False (it waits for the GPU, say) runs eagerly, and `explain` gives the reason in its
            ``uncapturable_because``, a text; so does one that holds such a module.
        schedule: what the model was trained on.
        method: "ddim" (Song et al. 2021, eq. 12), "ddpm" (Ho et al. 2020, algorithm 2), "ddim_hat"
            (DDIM, section 5: the larger sigma), "ddgan" (Xiao et al. 2022, eq. 4), or a solver of
            higher order or for a distilled model: "dpmpp", "dpmpp_sde", "unipc", "heun", "plms",
            "euler", "euler_a", "lcm", "tcd", each in `stepfuse.engine.sampling.methods`.
        order, solver_type: of "dpmpp" and "dpmpp_sde" 1, 2 or 3, "midpoint" or "heun"; of "unipc"
            1, 2 or 3, "bh1" or "bh2". None: second order, "midpoint" and "bh2".
        strict: as other libraries compute it. False: "dpmpp" of order 3 is of third order, "plms"
            averages epsilons of a model that predicts v.
        steps, spacing, steps_offset: see `spaced_timesteps`.
        timesteps: the timesteps themselves, descending, instead of those three.
        grid: "karras", "exponential", "logsnr", "beta" or a list of sigmas instead: timesteps that
            need not be whole, see `stepfuse.engine.sampling.grids`. A model whose attribute
            ``integer_timesteps`` is True refuses those.
        eta: stochasticity of "ddim": 0 is deterministic, 1 has DDPM's variance; gamma of "tcd".
        prediction_type: "epsilon", "sample" (x0), "v_prediction", "mean" (of the posterior), or
            "flow_prediction" (eps - x0 of flow matching, where t / T is sigma).
        variance_type: of "ddpm": "fixed_small" (beta~), "fixed_large" (beta), or "learned" and
            "learned_range" for models of 2C channels (Nichol & Dhariwal 2021, section 3.1).
        variance_at_zero: log beta~ at the last step is that of the one before ("next") or
            log 1e-20 ("clamp").
        clip_sample: clip the predicted x0 to +-this; None for no clipping.
        rederive_epsilon: after clipping, take epsilon from the clipped x0.
        final_alpha_one: the last step goes to x_0; False stops at abar_0.
        guidance: `CFG`, `ClassifierGuidance` or another object that follows `Guidance`.
        backend: of the update: "auto", "reference", "cpp" or "triton".
        graph: "auto" or "step" capture one step and replay it, "loop" captures the whole loop where
            there are CUDA graphs, None runs eagerly. What cannot be captured runs eagerly;
            `explain` says why.
        optimize: run the model through `stepfuse.optimize`: True in its own dtype, torch.bfloat16
            for its convolutions and matrix products. Call `refresh` after changing weights. For
            more settings give ``optimize(model, ...)`` as the model.
        dtype: of x between the steps; float64 needs the reference backend.
        max_programs: how many shapes keep their buffers and captured step.
        device: where x lies, by default where the model's weights are, and the CPU for a model
            without any. A function around networks on CUDA needs it.

    Raises ValueError, TypeError or `BackendUnavailable` here, not while sampling, for settings that
    do not fit together.

    A copy or pickle has the settings and the model and no buffers yet; it samples the same images.
    Of the settings ``guidance`` can be assigned; the table is changed by `set_timesteps`.
    """

    OWN = ("_programs", "_lock")

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        *,
        method: str | Method = "ddim",
        steps: int | str = 50,
        spacing: Spacing = "leading",
        steps_offset: int = 0,
        timesteps: Sequence[float] | None = None,
        grid: Grid | None = None,
        order: int | None = None,
        solver_type: str | None = None,
        strict: bool = True,
        eta: float = 0.0,
        prediction_type: PredictionType = "epsilon",
        variance_type: VarianceType = "fixed_small",
        variance_at_zero: VarianceAtZero = "next",
        clip_sample: float | None = 1.0,
        rederive_epsilon: bool = True,
        final_alpha_one: bool = True,
        guidance: Guidance | None = None,
        backend: str = "auto",
        graph: GraphMode | None = "auto",
        optimize: bool | torch.dtype = False,
        dtype: torch.dtype = torch.float32,
        max_programs: int = 4,
        device: torch.device | str | None = None,
    ) -> None:
        check_kind("schedule", schedule, Schedule, "a Schedule, Schedule.linear() say")
        check_dtype("dtype", dtype)
        check_guidance(guidance)
        self.max_programs = as_integer("max_programs", max_programs)
        self.schedule, self._guidance, self.graph, self.dtype = schedule, guidance, graph, dtype
        update = Update(
            method,
            eta,
            prediction_type,
            variance_type,
            variance_at_zero,
            clip_sample,
            rederive_epsilon,
            final_alpha_one,
            order,
            solver_type,
            strict,
        )
        # guidance may need two shapes for each of the sampler's
        self.denoiser = Denoiser(optimized(model, optimize, 2 * self.max_programs))
        self.device = self.denoiser.place(device)
        self.backend = resolve(backend, self.device, dtype)
        self._renew()
        chosen = self._chosen(update, steps, spacing, steps_offset, timesteps, grid)
        self._plan(update, chosen, guidance)

    def _follow(self, plan: Plan, update: Update, guidance: Guidance | None) -> None:
        self.denoiser.check_timesteps(plan.timesteps)
        steering = Steering.of(guidance)
        if steering is not None:
            steering.check_steps(
                str(update.method),
                update.prediction_type,
                several=plan.slots > 0,
                differentiable=self.denoiser.differentiable,
            )
        with self._lock:
            if isinstance(self.denoiser.model, Optimized) and plan.whole:
                self.denoiser.model.prepare(map(int, plan.timesteps))
            before = vars(self).get("update", update)
            variance = before.uses_learned_variance != update.uses_learned_variance
            mean = before.shifts_mean != update.shifts_mean
            if guidance is not self._guidance or variance or mean:
                self._programs.clear()  # they are built for the other
            planned = {"plan": plan, "timesteps": plan.timesteps, "update": update}
            vars(self).update(planned, _guidance=guidance)

    def _renew(self) -> None:
        order = DeviceOrder(self.device)
        self._programs = Programs(self._build, self.denoiser, self.graph, self.max_programs, order)
        self._lock = Turn(order)

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        seed: int | Tensor = 0,
        first_index: int | Tensor = 0,
        batch_size: int | None = None,
        condition: Condition | None = None,
        x_T: Tensor | None = None,
        noise: Tensor | None = None,
        progress: bool = False,
        *,
        start: int | None = None,
        image: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        measurement: Tensor | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Draw ``shape[0]`` samples; the result is [N, C, ...] in the sampler's dtype.

        Sample n depends on (seed, first_index + n) alone, whatever batch it is drawn in, as far as
        the model's own arithmetic does not depend on its batch.

        Args:
            shape: (N, C, ...).
            seed: 64 bit, one int or int64 [N].
            first_index: number of the first sample, or int64 [N].
            batch_size: most samples at a time; None for all at once.
            condition: keyword arguments of the model: tensors, NumPy arrays (which become tensors)
                and settings, nested in dicts, lists, tuples and what else `torch.utils._pytree`
                knows. Tensors have one entry per sample, wherever they are. A list of numbers as
                the value of an argument, ``{"labels": [3, 7]}``, is such a tensor, too; a tuple of
                numbers is a setting, as is anything but tensors: the same for every sample.
            x_T: where to start, [N, C, ...]; drawn from ``seed`` otherwise.
            noise: [S, N, C, ...] to use instead of drawing from ``seed`` (row i in step i).
            progress: show a progress bar.
            start: timestep at which ``x_T`` stands; the sampler's first at or below it is taken.
            image: [N, C, ...] to start from (SDEdit): noised to the timestep that ``strength``
                names; or with ``mask``, the image to be completed.
            strength: in (0, 1]: which part of the timesteps to run on ``image``.
            mask: [N or 1, 1 or C, ...]: 1 where to generate, 0 where to keep ``image``.
            measurement: y [N, ...] of the images sought, which `PiGDM` and `DPS` need.
            callback: called with a `Step` after every step; its tensors are copies.

        Ctrl-C leaves the sampler usable.
        """
        request = self._request(
            *(shape, seed, first_index, condition, x_T, noise, start, image, strength, mask),
            measurement=measurement,
        )
        return self._run(request, self._begun(request), batch_size, progress, callback)

    def iterate(
        self,
        shape: Sequence[int],
        seed: int | Tensor = 0,
        first_index: int | Tensor = 0,
        condition: Condition | None = None,
        x_T: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        start: int | None = None,
        image: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        measurement: Tensor | None = None,
    ) -> Iterator[Step]:
        """`sample`, one `Step` at a time (progressive generation, DDPM section 4.3).

        From the first step until the iterator is finished or closed the sampler does nothing else:
        other threads wait, and a call in the same thread raises RuntimeError.
        """
        request = self._request(
            *(shape, seed, first_index, condition, x_T, noise, start, image, strength, mask),
            measurement=measurement,
        )
        asked = DeviceOrder(self.device)
        asked.done()
        return self._walk(request, self._begun(request), asked)

    def _begun(self, request: Request) -> Plan:
        """The plan that a request runs down."""
        plan, request.first_row = self._plan_since(request.first)
        return plan

    def _walk(self, request: Request, plan: Plan, asked: DeviceOrder) -> Iterator[Step]:
        with self._lock:
            asked.wait(*request.tensors())  # the first step may be on another stream
            (part,) = request.parts(None)
            runner = self._load(part, plan)
            for i in self._steps(runner, part, plan):
                step = Step.of(i, plan, runner.program)
                with self._lock.lent():
                    yield step
                runner.check()  # whoever had the step may have changed the model

    def explain(self) -> str:
        """The plan in words: table, evaluations, backends, and what was captured or why not."""
        lines = [
            *self._described(),
            *self._measuring(),
            f"update      {self.backend} on {self.device}, x in {self.dtype}",
            f"capture     {self._programs.explain(self.device)}",
        ]
        return "\n".join(lines)

    def _measuring(self) -> list[str]:
        """What a gradient through the network costs, where the guidance takes one."""
        if self.steering is None or not self.steering.measures:
            return []
        lines = [
            "gradient    one vector-Jacobian product a guided step: activations are kept for it"
        ]
        if isinstance(self.denoiser.model, Optimized):
            lines.append("            of the original network: the compiled one serves other steps")
        return lines

    def stats(self) -> dict[str, int]:
        """Counts of captures, replays, eager steps and evictions, and bytes of static buffers."""
        return self._programs.stats()

    def reset(self) -> None:
        """Forget every program, and what was found out about capturing its steps."""
        with self._lock:
            self._programs.clear()

    def refresh(self) -> None:
        """Read the weights again, after they were changed, into an optimised model's packed copies.

        Of the model, and of every optimised one that ran in a step. Captured steps are kept. Not
        needed for other models: there a changed weight is in force.
        """
        with self._lock:
            models = list(self._programs.optimized)
            if isinstance(self.denoiser.model, Optimized) and self.denoiser.model not in models:
                models.append(self.denoiser.model)
            for model in models:
                model.refresh()

    def _run(
        self,
        request: Request,
        plan: Plan,
        batch_size: int | None,
        progress: bool,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Every part of a request, one after the other, into one tensor."""
        check_watching(progress, callback)
        result = torch.empty(request.shape, dtype=self.dtype, device=self.device)
        parts = list(request.parts(batch_size))
        steps = sum(len(plan.timesteps) - part.first_row for part in parts)
        with self._lock, tqdm(total=steps, unit="step", disable=not progress) as bar:
            for part in parts:
                runner = self._load(part, plan)
                if callback is None and runner.run_loop(part, plan.guided[part.first_row :]):
                    bar.update(len(plan.timesteps) - part.first_row)
                else:
                    for i in self._steps(runner, part, plan):
                        bar.update()
                        if callback is not None:
                            with self._lock.lent():
                                callback(Step.of(i, plan, runner.program))
                            runner.check()  # it may have changed the model
                result[part.start : part.stop].copy_(runner.program.x)
        return result

    def _steps(self, runner: Runner[Program], part: Part, plan: Plan) -> Iterator[int]:
        """The loop: one step after the other, yielding the number of each when it is done."""
        for i in range(part.first_row, len(plan.timesteps)):
            with torch.no_grad():
                if part.noise is not None:
                    runner.program.take_noise(part.noise[plan.left_out + i])
                runner.run_step(plan.guided[i])
            yield i

    def _load(self, part: Part, plan: Plan) -> Runner[Program]:
        """The runner for a part, its buffers filled."""
        with torch.no_grad():
            runner = self._programs.get(part, plan)
            runner.program.load(part, plan)
            runner.check()
        return runner

    def _build(self, layout: Layout, part: Part) -> Program:
        return Program(
            self.denoiser,
            self.steering,
            layout,
            Staged(part.condition, part.replacement),
            # warming up a CUDA graph runs a few rows past the end
            most_rows(self.schedule.num_train_timesteps, layout.slots > 0) + 4,
            learned_variance=self.update.uses_learned_variance,
            mean_guidance=self.mean_guidance,
            backend=self.backend,
        )

    def _request(self, shape: Sequence[int], *arguments: Any, **named: Any) -> Request:
        guidance = named.pop("guidance", self.steering)
        self._look_at_guidance()
        flow = self.update.prediction_type == "flow_prediction"
        request = Request(
            self._asked,
            len(self.timesteps),
            self.schedule.num_train_timesteps - 1 + flow,
            self._level,
            self.device,
            self.dtype,
            self.backend,
            guidance,
            shape,
            *arguments,
            **named,
        )
        for condition in (request.condition, request.replacement or {}):
            self.denoiser.check_labels(condition)
        return request
