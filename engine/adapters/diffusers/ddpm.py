"""`DDPMScheduler` of diffusers, its update done by `denoise_step`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stepfuse.engine.adapters.diffusers.scheduler_base import NoisingScheduler
from stepfuse.engine.adapters.diffusers.scheduler_rows import ddpm_rows
from stepfuse.kernels.step_row import Column

# before 0.32 a step of a list that was not given went to t - T // S
_BY_STRIDE = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 32)
_LEARNED = ("learned", "learned_range")
_SMALLEST_VARIANCE = 1e-20


class DDPMScheduler(NoisingScheduler):
    """DDPM (Ho et al. 2020) with the options, timesteps and seeded results of diffusers.

        x_s = c_0 x0 + c_x x_t + sigma z          eq. 7 and 11

    The parameters are those of ``diffusers.DDPMScheduler``, and its configurations load here and
    the other way. ``strict=False`` does what is right where diffusers does not: no noise in the
    step to x_0, also where it starts at t > 0 ("trailing" spacing); "learned" is a log variance;
    "fixed_large_log" is a deviation and no NaN; indices outside the training schedule are left out;
    coefficients are computed in float64. It is an attribute, and no part of the configuration.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    _home = "scheduling_ddpm"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        *,
        strict: bool = True,
    ) -> None:
        self._begin(strict)
        self.one = torch.tensor(1.0)
        self.custom_timesteps = False
        self.variance_type = variance_type

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps of a loop: so many by ``timestep_spacing``, or this list.

        Raises ValueError for both, for a list that does not descend or starts outside the training
        schedule, and for more steps than that has.
        """
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)  # type: ignore[arg-type]
            self.custom_timesteps = False
            return
        if num_inference_steps is not None:
            raise ValueError(
                "give num_inference_steps or timesteps, not both; got "
                f"{num_inference_steps} and {timesteps}"
            )
        listed = torch.as_tensor(timesteps, dtype=torch.int64, device="cpu")
        if bool((listed.diff() >= 0).any()):
            raise ValueError(f"timesteps must descend; got {listed.tolist()}")
        if listed[0] >= self.config.num_train_timesteps:
            raise ValueError(
                f"timesteps must start below {self.config.num_train_timesteps}; got {listed[0]}"
            )
        self.custom_timesteps = True
        self._take_timesteps(listed, device)

    def _previous(self, timesteps: list[int]) -> list[int]:
        """The entries after these in the list, -1 after the last; t - 1 where none was chosen."""
        if not (self.custom_timesteps or self.num_inference_steps):
            return [t - 1 for t in timesteps]
        if _BY_STRIDE and self.strict and not self.custom_timesteps:
            stride = len(self) // self.num_inference_steps  # type: ignore[operator]
            return [t - stride for t in timesteps]
        listed = self._timestep_list()
        # where an index is repeated the first counts: read backwards, it is written last
        after = dict(zip(reversed(listed), reversed([*listed[1:], -1]), strict=True))
        for t in timesteps:
            if t not in after:
                raise IndexError(f"timestep must be one of the {len(listed)} chosen; got {t}")
        return [after[t] for t in timesteps]

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The timestep that `step` goes to from ``timestep``, -1 standing for x_0."""
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        return torch.tensor(
            self._previous([self._index(timestep)])[0], device=self.timesteps.device
        )

    def _rows(self, timesteps: list[int], *options: Any) -> Tensor:
        kind, _ = options
        abar, t = self._abar(), torch.tensor(timesteps, device="cpu")
        previous = torch.tensor(self._previous(timesteps), device="cpu")
        ends = torch.where(previous >= 0, abar[previous.clamp(min=0)], self.one.to(abar))
        rows = ddpm_rows(t, abar[t], ends, self.config.prediction_type, self._clip(), kind)
        if self.strict and kind == "learned":
            rows[:, Column.L_1] = 0.0  # a variance, which `step` multiplies into the noise
        if self.strict and kind == "fixed_large_log":
            rows[:, Column.SIGMA] = torch.nan  # the square root of a log, which is negative
        silent = t <= 0 if self.strict else previous < 0
        for column in (Column.SIGMA, Column.L_0, Column.L_1):
            rows[silent, column] = 0.0
        return rows

    def _get_variance(
        self,
        t: int | Tensor,
        predicted_variance: Tensor | None = None,
        variance_type: str | None = None,
    ) -> Tensor:
        """What diffusers calls the variance of the step from t: see ``variance_type`` there."""
        kind = variance_type or self.config.variance_type
        if kind == "learned":
            return predicted_variance  # type: ignore[return-value]
        index, abar = self._index(t), self.alphas_cumprod
        previous = self._previous([index])[0]
        large = 1 - abar[index] / (abar[previous] if previous >= 0 else self.one)
        before = abar[previous] if previous >= 0 else self.one
        small = ((1 - before) / (1 - abar[index]) * large).clamp(min=_SMALLEST_VARIANCE)
        if kind == "learned_range":
            share = (predicted_variance + 1) / 2  # type: ignore[operator]
            return share * large.log() + (1 - share) * small.log()
        by_kind = {
            "fixed_small_log": small.sqrt(),
            "fixed_large": large,
            "fixed_large_log": large.log(),
        }
        return by_kind.get(kind, small)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x_s.

        Args:
            model_output: [N, C, ...], what ``prediction_type`` says, or [N, 2C, ...] with a learned
                variance in the second half.
            timestep: t, an int or a tensor of one.
            sample: x_t, [N, C, ...].
            generator: draws z; one, or a list of one per sample.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Raises ValueError for an unknown ``prediction_type``, IndexError for a t that is not in
        ``timesteps``, TypeError for a learned variance that the model did not give.
        """
        t = self._index(timestep)
        kind = self.config.variance_type
        thresholding = self.config.thresholding
        row = self._row(t, sample, kind, thresholding)
        split = self.variance_type in _LEARNED and model_output.shape[1] == 2 * sample.shape[1]
        learned, noise = kind in _LEARNED, None
        if t > 0 if self.strict else row.numbers[Column.SIGMA] > 0:
            if learned and not split:
                raise TypeError(
                    f"variance_type {kind!r} needs a model output of {2 * sample.shape[1]} "
                    f"channels; got {model_output.shape[1]}"
                )
            noise = randn_tensor(
                sample.shape if split else model_output.shape,
                generator=generator,
                device=model_output.device,
                dtype=model_output.dtype,
            )
            if kind == "learned" and self.strict:
                noise = model_output[:, sample.shape[1] :].sqrt() * noise
                learned = False
        learned = learned and noise is not None
        x_s, x0 = self._update(row, sample, model_output, noise, thresholding, split, learned)
        if not return_dict:
            return x_s, x0
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x0)
