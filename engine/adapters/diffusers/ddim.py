"""`DDIMScheduler` of diffusers, its update done by `denoise_step`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stepfuse.engine.adapters.diffusers.scheduler_base import NoisingScheduler
from stepfuse.engine.adapters.diffusers.scheduler_rows import ddim_rows
from stepfuse.engine.sampling.rows import posterior_variance


class DDIMScheduler(NoisingScheduler):
    """DDIM (Song et al. 2021) with the options, timesteps and seeded results of diffusers.

        x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) eps + sigma z          eq. 12

    The parameters are those of ``diffusers.DDIMScheduler``, and its configurations load here and
    the other way. ``strict=False`` does what is right where diffusers does not: s is the next entry
    of ``timesteps`` instead of t - T // S, indices outside the training schedule are left out,
    coefficients are computed in float64. It is an attribute, and no part of the configuration.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    _home = "scheduling_ddim"
    _end = "final_alpha_cumprod"

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
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        *,
        strict: bool = True,
    ) -> None:
        self._begin(strict)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]

    def _ends(self, timesteps: list[int], abar: Tensor) -> Tensor:
        """abar where steps end: at t - T // S, or at the next entry where not strict."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps first")
        config, final = self.config, self.final_alpha_cumprod.to(abar)
        stride = config.num_train_timesteps // self.num_inference_steps
        previous = [t - stride for t in timesteps]
        if not self.strict:
            listed = self._timestep_list()
            after = dict(zip(listed, [*listed[1:], -1], strict=True))
            previous = [after.get(t, s) for t, s in zip(timesteps, previous, strict=True)]
            final = final if config.set_alpha_to_one else abar[0]
        s = torch.tensor(previous, device="cpu")
        return torch.where(s >= 0, abar[s.clamp(min=0)], final)

    def _rows(self, timesteps: list[int], *options: Any) -> Tensor:
        eta, clipped, _ = options
        abar, t = self._abar(), torch.tensor(timesteps, device="cpu")
        prediction_type, ends = self.config.prediction_type, self._ends(timesteps, abar)
        return ddim_rows(t, abar[t], ends, prediction_type, self._clip(), eta, clipped)

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """sigma^2 at eta = 1 from ``timestep`` to ``prev_timestep`` (DDIM, eq. 16)."""
        abar = self.alphas_cumprod
        end = abar[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod
        return posterior_variance(abar[timestep], end)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """From x_t to x_s.

        Args:
            model_output: [N, C, ...], what ``prediction_type`` says.
            timestep: t, an int or a tensor of one.
            sample: x_t, of the shape of ``model_output``.
            eta: 0 is deterministic, 1 the variance of DDPM.
            use_clipped_model_output: re-derive epsilon from the clipped x0.
            generator: draws z where ``eta > 0``; one, or a list of one per sample.
            variance_noise: z itself.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Raises ValueError without `set_timesteps` before, for an unknown ``prediction_type``, and
        for both ``generator`` and ``variance_noise``; IndexError for a t outside the schedule.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        thresholding = self.config.thresholding
        row = self._row(
            self._index(timestep), sample, float(eta), bool(use_clipped_model_output), thresholding
        )
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("give generator or variance_noise, not both")
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    model_output.shape,
                    generator=generator,
                    device=model_output.device,
                    dtype=model_output.dtype,
                )
        x_s, x0 = self._update(row, sample, model_output, noise, thresholding)
        if not return_dict:
            return x_s, x0
        return DDIMSchedulerOutput(prev_sample=x_s, pred_original_sample=x0)
