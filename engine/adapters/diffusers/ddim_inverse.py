"""`DDIMInverseScheduler` of diffusers, its update done by `denoise_step`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput
from torch import Tensor

from stepfuse.engine.adapters.diffusers.scheduler_base import StepScheduler
from stepfuse.engine.adapters.diffusers.scheduler_rows import inverse_rows


class DDIMInverseScheduler(StepScheduler):
    """DDIM read upward: from an image to the noise it comes from (Song et al. 2021, section 4.3).

        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps(x_s, t)

    The parameters, timesteps and results are those of ``diffusers.DDIMInverseScheduler``: the model
    is evaluated at the timestep the step goes to, the first step starts at abar = 1 (or abar_0 with
    ``set_alpha_to_one=False``), and epsilon is never re-derived from a clipped x0.
    ``strict=False``: a step starts at the entry of ``timesteps`` before instead of t - T // S,
    indices outside the training schedule are left out, coefficients are computed in float64.
    """

    ignore_for_config = ["kwargs", "strict"]  # noqa: RUF012
    _deprecated_kwargs = ["set_alpha_to_zero"]  # noqa: RUF012
    _ascending = True
    _spacings = ("leading", "trailing")
    _home = "scheduling_ddim_inverse"
    _end = "initial_alpha_cumprod"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        *,
        strict: bool = True,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("set_alpha_to_zero") is not None:  # the name that diffusers had before
            set_alpha_to_one = kwargs["set_alpha_to_zero"]
        self._begin(strict)
        self.initial_alpha_cumprod = (
            torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        )

    def _rows(self, timesteps: list[int], *options: Any) -> Tensor:
        assert self.num_inference_steps is not None
        config, abar, t = self.config, self._abar(), torch.tensor(timesteps, device="cpu")
        stride = config.num_train_timesteps // self.num_inference_steps
        starts = [min(s - stride, config.num_train_timesteps - 1) for s in timesteps]
        if not self.strict:
            listed = self._timestep_list()
            before = dict(zip(listed, [-1, *listed[:-1]], strict=True))
            starts = [before.get(t, s) for t, s in zip(timesteps, starts, strict=True)]
        s, first = torch.tensor(starts, device="cpu"), self.initial_alpha_cumprod.to(abar)
        a = torch.where(s >= 0, abar[s.clamp(min=0)], first)
        return inverse_rows(t, a, abar[t], config.prediction_type, self._clip())

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """From x_s up to x_t, with the model evaluated at t.

        model_output, sample: [N, C, ...]; timestep: t, an int or a tensor of one. Returns
        ``prev_sample`` (x_t) and ``pred_original_sample``, as a tuple with ``return_dict=False``.
        Raises TypeError without `set_timesteps` before, IndexError for a t outside the schedule.
        """
        if self.num_inference_steps is None:
            raise TypeError("num_inference_steps is None: call set_timesteps before step")
        row = self._row(self._index(timestep), sample)
        x_t, x0 = self._update(row, sample, model_output, None)
        if not return_dict:
            return x_t, x0
        return DDIMSchedulerOutput(prev_sample=x_t, pred_original_sample=x0)
