"""Walking between samples: spherical and linear interpolation."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfuse.engine.sampling.denoiser import Condition
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.kernels import philox
from stepfuse.kernels.arguments import check_floats, check_kind
from stepfuse.kernels.checks import as_integer, as_number


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation of two latents of any, equal shape (DDIM, eq. 66-67).

        sin((1-w) theta)/sin(theta) a + sin(w theta)/sin(theta) b,   theta = acos(<a,b> / |a||b|)

    taken over the whole tensor. ``weight`` 0 gives a, 1 gives b. Where a and b are (anti)parallel,
    or one of them is 0, the limit for theta -> 0 is taken, which is the straight line. ``weight``
    may be a tensor of one number, which is not read on the host.

    Raises ValueError or TypeError for different shapes, or numbers that are not real and finite.
    """
    check_floats("a", a)
    check_floats("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}")
    u, v = a.double().flatten(), b.double().flatten()
    w = _weight(weight, a.device)
    norms = u.norm() * v.norm()
    cosine = torch.where(norms > 0, (u @ v) / norms.clamp_min(1e-300), torch.ones_like(norms))
    theta = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(theta)
    straight = sine < 1e-6
    safe = torch.where(straight, torch.ones_like(sine), sine)
    from_a = torch.where(straight, 1 - w, torch.sin((1 - w) * theta) / safe)
    from_b = torch.where(straight, w, torch.sin(w * theta) / safe)
    return (from_a * u + from_b * v).view(a.shape).to(a.dtype)


def _weight(weight: float | Tensor, device: torch.device) -> Tensor:
    """float64 []; a tensor is not read."""
    if not isinstance(weight, Tensor):
        return torch.tensor(as_number("weight", weight), dtype=torch.float64, device=device)
    check_floats("weight", weight)
    if weight.numel() != 1:
        raise ValueError(f"weight must be one number; got shape {tuple(weight.shape)}")
    return weight.to(device=device, dtype=torch.float64).reshape(())


@torch.no_grad()
def interpolate(
    sampler: Sampler,
    xa: Tensor,
    xb: Tensor,
    weight: float,
    t: int,
    *,
    seed: int = 0,
    condition: Condition | None = None,
) -> Tensor:
    """Images between two images: noise both to t, mix linearly, sample down (DDPM, section 4.4).

    Args:
        xa, xb: [N, C, ...] in the model's range.
        weight: 0 gives xa, 1 gives xb, as far as the noise lets them through.
        t: how far up to go; the sampler's first timestep <= t is taken.
        seed: of the noise, which is that of samples 0 .. N-1 for xa and N .. 2N-1 for xb.
        condition: of the model, for the N results.

    Raises ValueError or TypeError for images of different shapes, numbers that are not real and
    finite, or a t below the sampler's last timestep.
    """
    check_kind("sampler", sampler, Sampler, "a Sampler")
    check_floats("xa", xa)
    check_floats("xb", xb)
    weight, t, seed = as_number("weight", weight), as_integer("t", t), as_integer("seed", seed)
    if xa.shape != xb.shape:
        raise ValueError(
            f"xa and xb must have one shape; got {tuple(xa.shape)} and {tuple(xb.shape)}"
        )
    if xa.dim() < 2 or not xa.numel():
        raise ValueError(f"xa and xb must have shape [N, C, ...]; got {tuple(xa.shape)}")
    last = sampler.schedule.num_train_timesteps - 1
    if t > last:
        raise ValueError(f"t must be at most {last}; got {t}")
    below = [index for index in sampler.timesteps if index <= t]
    if not below:
        raise ValueError(f"t must be at least {sampler.timesteps[-1]}; got {t}")
    signal, sigma = sampler._level(below[0])
    samples = torch.arange(2 * len(xa), device=xa.device)
    noise = philox.normal(seed, samples, philox.INITIAL, xa.shape[1:]).to(xa.dtype)
    noised = signal * torch.cat([xa, xb]) + sigma * noise
    mixed = (1 - weight) * noised[: len(xa)] + weight * noised[len(xa) :]
    return sampler.sample(xa.shape, seed=seed, condition=condition, x_T=mixed, start=t)
