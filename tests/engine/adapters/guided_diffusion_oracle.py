"""Gaussian diffusion with the interface of guided-diffusion, written from the papers' equations.

Every method computes in the dtype of x, float64 included, one distribution at a time: nothing is
folded into coefficients. DDPM (Ho et al. 2020), DDIM (Song et al. 2021), learned variances (Nichol
and Dhariwal 2021), classifier guidance (Dhariwal and Nichol 2021, algorithms 1 and 2).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MeanType = enum.Enum("MeanType", ["PREVIOUS_X", "START_X", "EPSILON"])
VarType = enum.Enum("VarType", ["LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])


@dataclass
class Reverse:
    """p(x_{t-1} | x_t) = N(mean, variance), and the x0 and eps it came from."""

    mean: Tensor
    variance: Tensor
    noise_std: Tensor
    x0: Tensor


class Diffusion:
    """A chain over betas [T]; ``t`` below is an index 0..T-1, one per sample."""

    def __init__(
        self,
        betas: Sequence[float],
        model_mean_type: Any = MeanType.EPSILON,
        model_var_type: Any = VarType.FIXED_SMALL,
        rescale_timesteps: bool = False,
    ) -> None:
        self.betas = np.asarray(betas, dtype=np.float64)
        self.num_timesteps = len(self.betas)
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.rescale_timesteps = rescale_timesteps
        products = [1.0]
        for beta in self.betas:
            products.append(products[-1] * (1 - float(beta)))
        self.products = torch.tensor([*products, 0.0], dtype=torch.float64)

    def told(self, t: Tensor) -> Tensor:
        """What a network hears of index t."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def abar(self, t: Tensor, x: Tensor) -> Tensor:
        """The product of 1 - beta up to and with t; 1 before the first, 0 after the last."""
        values = self.products[t + 1]
        return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def reverse(
        self, model: Any, x: Tensor, t: Tensor, clip: bool, fix: Any, kwargs: dict[str, Any] | None
    ) -> Reverse:
        out = model(x, self.told(t), **(kwargs or {}))
        out, extra = out[:, : x.shape[1]], out[:, x.shape[1] :]
        a, b = self.abar(t, x), self.abar(t - 1, x)
        alpha, beta = a / b, 1 - a / b
        # q(x_{t-1} | x_t, x0): DDPM, eq. 7
        towards, keeps = b.sqrt() * beta / (1 - a), alpha.sqrt() * (1 - b) / (1 - a)
        if self.model_mean_type is MeanType.EPSILON:
            x0 = (x - (1 - a).sqrt() * out) / a.sqrt()
        elif self.model_mean_type is MeanType.START_X:
            x0 = out
        else:
            x0 = (out - keeps * x) / towards
        if fix is not None:
            x0 = fix(x0)
        if clip:
            x0 = x0.clamp(-1, 1)
        mean = out if self.model_mean_type is MeanType.PREVIOUS_X else towards * x0 + keeps * x
        variance, std = self.variances(t, x, extra, beta, beta * (1 - b) / (1 - a))
        return Reverse(mean, variance, std, x0)

    def variances(
        self, t: Tensor, x: Tensor, extra: Tensor, beta: Tensor, small: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(variance, standard deviation of the noise): they differ where beta~ is 0."""
        first = (t == 0).view(beta.shape)
        a, b = self.abar(torch.ones_like(t), x), self.abar(torch.zeros_like(t), x)
        second = (1 - a / b) * (1 - b) / (1 - a)  # beta~ of index 1, taken at 0 where a log is
        kind = self.model_var_type
        if kind is VarType.LEARNED:
            return extra.exp(), extra.exp().sqrt()
        clipped = torch.where(first, second, small)
        if kind is VarType.LEARNED_RANGE:
            between = (extra + 1) / 2
            mixed = beta**between * clipped ** (1 - between)
            return mixed, mixed.sqrt()
        if kind is VarType.FIXED_SMALL:
            return small.expand_as(x), clipped.sqrt()
        large = torch.where(first, second, beta)
        return large.expand_as(x), large.sqrt()

    def p_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        p = self.reverse(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        z = torch.randn_like(x)
        mean = p.mean
        if cond_fn is not None:
            mean = mean + p.variance * cond_fn(x, self.told(t), **model_kwargs)
        z = torch.where((t == 0).view(-1, *[1] * (x.dim() - 1)), 0.0, z)
        return {"sample": mean + p.noise_std * z, "pred_xstart": p.x0}

    def ddim_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        x0 = self.reverse(model, x, t, clip_denoised, denoised_fn, model_kwargs).x0
        a, b = self.abar(t, x), self.abar(t - 1, x)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        if cond_fn is not None:
            eps = eps - (1 - a).sqrt() * cond_fn(x, self.told(t), **model_kwargs)
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        z = torch.randn_like(x)
        sample = b.sqrt() * x0 + (1 - b - sigma**2).clamp_min(0).sqrt() * eps + sigma * z
        return {"sample": sample, "pred_xstart": x0}

    def ddim_reverse_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        assert eta == 0.0
        x0 = self.reverse(model, x, t, clip_denoised, denoised_fn, model_kwargs).x0
        a, d = self.abar(t, x), self.abar(t + 1, x)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return {"sample": d.sqrt() * x0 + (1 - d).sqrt() * eps, "pred_xstart": x0}

    def p_sample_loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        given = {k: v for k, v in locals().items() if k != "self"}
        return list(self.p_sample_loop_progressive(**given))[-1]["sample"]

    def ddim_sample_loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        given = {k: v for k, v in locals().items() if k != "self"}
        return list(self.ddim_sample_loop_progressive(**given))[-1]["sample"]

    def p_sample_loop_progressive(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        how = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        how["model_kwargs"] = model_kwargs
        return self.descend(self.p_sample, model, shape, noise, device, how)

    def ddim_sample_loop_progressive(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        how = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        how |= {"model_kwargs": model_kwargs, "eta": eta}
        return self.descend(self.ddim_sample, model, shape, noise, device, how)

    def descend(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None,
        device: Any,
        how: dict[str, Any],
    ) -> Iterator[dict[str, Tensor]]:
        device = next(model.parameters()).device if device is None else device
        x = torch.randn(*shape, device=device) if noise is None else noise
        with torch.no_grad():
            for i in range(self.num_timesteps - 1, -1, -1):
                results = step(model, x, torch.full((shape[0],), i, device=device), **how)
                yield results
                x = results["sample"]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        assert noise.shape == x_start.shape
        a = self.abar(t, x_start)
        return a.sqrt() * x_start + (1 - a).sqrt() * noise


class Spaced(Diffusion):
    """The chain over some of the timesteps, with the betas between those that stay."""

    def __init__(self, use_timesteps: Sequence[int], betas: Sequence[float], **types: Any) -> None:
        whole = Diffusion(betas)
        kept = torch.tensor(sorted(use_timesteps))
        abar = whole.abar(kept, torch.zeros(1, dtype=torch.float64)).tolist()
        super().__init__(
            [1 - now / before for before, now in zip([1.0, *abar[:-1]], abar, strict=True)], **types
        )
        self.timestep_map, self.original_num_steps = kept.tolist(), len(betas)

    def told(self, t: Tensor) -> Tensor:
        t = torch.tensor(self.timestep_map, device=t.device)[t]
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t


class Improved(Diffusion):
    """improved-diffusion's interface: the same steps without ``cond_fn``."""

    def p_sample(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs)

    def p_sample_loop(  # type: ignore[override]
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        return list(self.p_sample_loop_progressive(**given))[-1]["sample"]

    def p_sample_loop_progressive(  # type: ignore[override]
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        how = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn}
        how["model_kwargs"] = model_kwargs
        return self.descend(self.p_sample, model, shape, noise, device, how)
