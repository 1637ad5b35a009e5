"""A diffusion with guided-diffusion's interface, in the words of the papers, for `accelerate`."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.sampling.plain_loop import legs, predictions, step
from stepfuse.engine.sampling.schedule import Schedule


class MeanType(Enum):
    """What the network predicts."""

    EPSILON = auto()


class VarType(Enum):
    """The variance of a step."""

    FIXED_SMALL = auto()


class Diffusion:
    """DDPM (Ho et al. 2020) and DDIM (Song et al. 2021) over all timesteps of a schedule."""

    model_mean_type, model_var_type = MeanType.EPSILON, VarType.FIXED_SMALL
    rescale_timesteps = False

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.betas = schedule, schedule.betas.numpy()
        self.num_timesteps = len(self.betas)
        self.legs = legs(schedule, range(self.num_timesteps - 1, -1, -1))[::-1]

    def p_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """{"sample": x_{t-1}, "pred_xstart": x0} by DDPM."""
        return self._step(model, x, t, clip_denoised, model_kwargs, method="ddpm")

    def ddim_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """{"sample": x_{t-1}, "pred_xstart": x0} by DDIM."""
        return self._step(model, x, t, clip_denoised, model_kwargs, method="ddim", eta=eta)

    def p_sample_loop(
        self,
        model: Any,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples by DDPM."""
        given = (model, shape, noise, clip_denoised, model_kwargs, device)
        return self._loop(*given, method="ddpm")

    def ddim_sample_loop(
        self,
        model: Any,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Samples by DDIM."""
        given = (model, shape, noise, clip_denoised, model_kwargs, device)
        return self._loop(*given, method="ddim", eta=eta)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        abar = self.schedule.alphas_cumprod.to(x_start.device)[t]
        abar = abar.view(-1, *[1] * (x_start.dim() - 1))
        return (abar.sqrt() * x_start + (1 - abar).sqrt() * noise).to(x_start.dtype)

    def _loop(
        self,
        model: Any,
        shape: tuple[int, ...],
        noise: Tensor | None,
        clip: bool,
        kwargs: dict[str, Any] | None,
        device: Any,
        **settings: Any,
    ) -> Tensor:
        x = torch.randn(*shape, device=device) if noise is None else noise
        with torch.no_grad():
            for i in range(self.num_timesteps - 1, -1, -1):
                t = torch.full((len(x),), i, device=x.device)
                x = self._step(model, x, t, clip, kwargs, **settings)["sample"]
        return x

    def _step(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip: bool,
        kwargs: dict[str, Any] | None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        leg = self.legs[int(t[0])]
        out = model(x, t, **(kwargs or {}))
        z = torch.randn_like(x)
        x0, _ = predictions(leg, "epsilon", x, out)
        limit = 1.0 if clip else None
        sample = step(leg, x, out, z, clip_sample=limit, **settings)
        return {"sample": sample, "pred_xstart": x0.clamp(-1, 1) if clip else x0}
