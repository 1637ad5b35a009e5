"""Noise schedules: the betas of DDPM (Ho et al. 2020) as float64 tables.

Index i = 0 .. T-1 stands for the paper's step t = i + 1; abar_i = alphas_cumprod[i].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from stepfuse.kernels.arguments import check_text, check_values
from stepfuse.kernels.checks import as_integer, as_number, check_flag, check_real


@dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete noise schedule. Frozen; every table is a float64 CPU tensor [T].

    Build it with one of the named constructors. ``betas`` are checked there: 0 <= beta <= 1, and
    beta = 1 only at the end (zero terminal signal-to-noise ratio); before it, ``alphas_cumprod``
    must not underflow to 0.
    """

    betas: Tensor
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        check_text("name", self.name)
        betas = _floats("betas", self.betas).clone()
        if betas.dim() != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a vector of at least one; got {tuple(betas.shape)}")
        if not bool(torch.isfinite(betas).all()):
            raise ValueError("betas must be finite; got NaN or infinity")
        if not bool(((betas >= 0) & (betas <= 1)).all()) or not bool((betas[:-1] < 1).all()):
            low, high = float(betas.min()), float(betas.max())
            raise ValueError(
                f"betas must be in [0, 1), the last may be 1; got values in [{low:g}, {high:g}]"
            )
        object.__setattr__(self, "betas", betas)
        gone = self.alphas_cumprod[:-1] < torch.finfo(torch.float64).tiny
        if bool(gone.any()):
            raise ValueError(
                "betas must leave some signal until the last timestep; alphas_cumprod underflows "
                f"to 0 at {int(gone.nonzero()[0])} of 0 .. {len(betas) - 1}"
            )

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar_i = prod_{j <= i} (1 - beta_j), float64 [T]."""
        return torch.cumprod(1 - self.betas, dim=0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and torch.equal(self.betas, other.betas)

    def __hash__(self) -> int:
        return hash(tuple(self.betas.tolist()))

    def __repr__(self) -> str:
        abar = self.alphas_cumprod
        return (
            f"Schedule({self.name}, num_train_timesteps={self.num_train_timesteps}, "
            f"alphas_cumprod={float(abar[0]):.6g} .. {float(abar[-1]):.6g})"
        )

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], name: str = "custom") -> Schedule:
        """The schedule of the given betas, [T]."""
        return cls(_floats("betas", betas), name)

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Tensor | Sequence[float], name: str = "custom"
    ) -> Schedule:
        """The schedule whose ``alphas_cumprod`` are given, [T], non-increasing in [0, 1]."""
        abar = _floats("alphas_cumprod", alphas_cumprod)
        if abar.dim() != 1 or len(abar) == 0:
            raise ValueError(
                f"alphas_cumprod must be a vector of at least one; got {tuple(abar.shape)}"
            )
        previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        # written so that NaN fails
        if not bool(((abar >= 0) & (abar <= previous)).all()) or not bool((previous > 0).all()):
            low, high = float(abar.min()), float(abar.max())
            raise ValueError(
                "alphas_cumprod must fall from at most 1, with betas in [0, 1), and only the last "
                f"may be 0; got values in [{low:g}, {high:g}]"
            )
        return cls(1 - abar / previous, name)

    @classmethod
    def linear(
        cls,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale: bool = True,
    ) -> Schedule:
        """beta_i from ``beta_start`` to ``beta_end`` in equal steps (DDPM, section 4).

        The ends are for T = 1000; for another T they are scaled by 1000 / T, as improved DDPM does,
        so that abar_T stays comparable. ``rescale=False`` takes them as they are.
        """
        num_train_timesteps = _checked_steps(num_train_timesteps)
        beta_start, beta_end = _betas(beta_start, beta_end)
        check_flag("rescale", rescale)
        ratio = 1000 / num_train_timesteps if rescale else 1.0
        if num_train_timesteps > 1 and beta_end * ratio > 1:
            raise ValueError(
                "beta_end * 1000 / num_train_timesteps must be at most 1; got "
                f"{beta_end * ratio:g} for {num_train_timesteps} steps: give rescale=False or a "
                "smaller beta_end"
            )
        return cls(_line(beta_start * ratio, beta_end * ratio, num_train_timesteps), "linear")

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> Schedule:
        """sqrt(beta) in equal steps (latent diffusion, Rombach et al. 2022; Stable Diffusion)."""
        num_train_timesteps = _checked_steps(num_train_timesteps)
        beta_start, beta_end = _betas(beta_start, beta_end)
        return cls(
            _line(beta_start**0.5, beta_end**0.5, num_train_timesteps).square(), "scaled_linear"
        )

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, offset: float = 0.008) -> Schedule:
        """abar(u) = cos^2((u + s) / (1 + s) pi / 2), beta <= 0.999 (Nichol & Dhariwal, eq. 17)."""
        offset = as_number("offset", offset)
        if not 0 <= offset < _NOT_CURVED:
            raise ValueError(f"offset must be in [0, {_NOT_CURVED:g}); got {offset}")
        return _from_curve(
            lambda u: math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2,
            num_train_timesteps,
            "cosine",
        )

    @classmethod
    def sigmoid_beta(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Schedule:
        """beta = sigmoid(r) (beta_end - beta_start) + beta_start, r from -6 to 6 (GeoDiff)."""
        num_train_timesteps = _checked_steps(num_train_timesteps)
        beta_start, beta_end = _betas(beta_start, beta_end)
        ramp = torch.sigmoid(_line(-6, 6, num_train_timesteps))
        return cls(ramp * (beta_end - beta_start) + beta_start, "sigmoid_beta")

    @classmethod
    def sigmoid_alpha(
        cls,
        num_train_timesteps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
    ) -> Schedule:
        """abar a scaled sigmoid of time, beta <= 0.999 (Jabri et al. 2022; Chen 2023)."""

        start, end, tau = (
            as_number(name, value) for name, value in (("start", start), ("end", end), ("tau", tau))
        )
        if not tau > 0:
            raise ValueError(f"tau must be positive; got {tau}")

        def sigmoid(value: float) -> float:
            return 1 / (1 + math.exp(min(-value, 700)))  # e^710 overflows

        first, last = sigmoid(start / tau), sigmoid(end / tau)
        if first == last:
            raise ValueError(
                "sigmoid(start / tau) and sigmoid(end / tau) must differ; got start, end, tau = "
                f"{start}, {end}, {tau}"
            )
        return _from_curve(
            lambda u: (last - sigmoid((u * (end - start) + start) / tau)) / (last - first),
            num_train_timesteps,
            "sigmoid_alpha",
        )

    @classmethod
    def keras(
        cls,
        num_train_timesteps: int = 1000,
        max_signal_rate: float = 0.95,
        min_signal_rate: float = 0.02,
    ) -> Schedule:
        """Angles theta in equal steps, signal = cos theta, noise = sin theta (Keras DDIM example).

        Index i is the diffusion time u = (i + 1) / T, theta = a0 + u (a1 - a0).
        """
        num_train_timesteps = _checked_steps(num_train_timesteps)
        high = as_number("max_signal_rate", max_signal_rate)
        low = as_number("min_signal_rate", min_signal_rate)
        if not 0 <= low < high <= 1:
            raise ValueError(
                "signal rates must be 0 <= min_signal_rate < max_signal_rate <= 1; got "
                f"{low} and {high}"
            )
        u = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        return cls.from_alphas_cumprod(keras_abar(u, high, low), "keras")

    def zero_terminal_snr(self) -> Schedule:
        """Shift and scale sqrt(abar) so that the last is 0 and the first unchanged.

        Lin et al. 2024, algorithm 1. An epsilon-predicting model cannot start there: x_T holds no
        signal, so that the sampler takes "v_prediction" or "sample" only.
        """
        if self.num_train_timesteps < 2:
            raise ValueError("zero_terminal_snr needs at least 2 timesteps; got 1")
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return Schedule.from_alphas_cumprod(root.square(), f"{self.name}, zero terminal SNR")


def keras_abar(u: Tensor, max_signal_rate: float = 0.95, min_signal_rate: float = 0.02) -> Tensor:
    """abar = cos^2 theta, theta = a0 + u (a1 - a0), at diffusion times u in [0, 1], float64.

    a0 and a1 are the angles whose cosines are the two rates (Keras DDIM example).
    """
    first, last = math.acos(max_signal_rate), math.acos(min_signal_rate)
    return (first + u.double() * (last - first)).cos().square()


def _line(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


_NOT_CURVED = 1e6  # an offset past which the cosine's curve is lost in rounding


def _floats(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """float64 on the CPU, without history; TypeError for numbers that are not real."""
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{name} must be a tensor or a sequence of numbers; got {values!r}")
    if isinstance(values, Tensor):
        check_values(name, values)
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        kind = type(values).__name__
        raise TypeError(f"{name} must be a tensor or a sequence of numbers; got {kind}") from None
    check_real(name, tensor)
    if tensor.dtype is torch.bool:
        raise TypeError(f"{name} must be numbers; got truth values")
    if not isinstance(values, Tensor):  # Python's floats are not rounded to float32 first
        tensor = torch.as_tensor(values, dtype=torch.float64)
    return tensor.detach().to(dtype=torch.float64, device="cpu")


def _betas(start: float, end: float) -> tuple[float, float]:
    """The ends of a line of betas; ValueError unless both are in [0, 1]."""
    checked = (as_number("beta_start", start), as_number("beta_end", end))
    for name, value in zip(("beta_start", "beta_end"), checked, strict=True):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1]; got {value}")
    return checked


def _checked_steps(num_train_timesteps: int) -> int:
    steps = as_integer("num_train_timesteps", num_train_timesteps)
    if not 1 <= steps < 2**24:
        raise ValueError(f"num_train_timesteps must be in 1 .. 2^24-1; got {steps}")
    return steps


def _from_curve(abar: Callable[[float], float], steps: int, name: str) -> Schedule:
    """beta_i = min(1 - abar((i+1)/T) / abar(i/T), 0.999)."""
    steps = _checked_steps(steps)
    curve = [abar(i / steps) for i in range(steps + 1)]
    if not all(before > 0 for before in curve[:-1]):
        raise ValueError(f"the {name} curve must be positive until its end; got {min(curve):g}")
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(curve)]
    return Schedule.from_betas(betas, name)
