"""Where the steps of a solver start and end, for whatever timesteps, whole or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.update import Update


@dataclass(frozen=True, eq=False)
class Points:
    """S steps between S + 1 points, at each of which x = signal x0 + noise eps.

    x may be kept in any scale, since only the ratio of the two matters to a solver:
    signal^2 + noise^2 = 1 for a diffusion model, signal = 1 where x is divided by it (diffusers'
    Euler), noise = 1 - signal for flow matching.

    Args:
        timesteps: what the model is given at the points where steps start, float64 [S].
        signal, noise: float64 [S + 1]; noise 0 at the end is x_0, signal 0 at the start pure noise.

    Raises ValueError for other shapes, and unless noise / signal falls or stays from point to
    point.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        for name in ("timesteps", "signal", "noise"):
            object.__setattr__(self, name, getattr(self, name).detach().double().cpu())
        count = self.timesteps.numel()
        shapes = [tuple(value.shape) for value in (self.timesteps, self.signal, self.noise)]
        if not count or shapes != [(count,), (count + 1,), (count + 1,)]:
            raise ValueError(
                f"timesteps, signal and noise must be [S], [S + 1] and [S + 1]; got {shapes}"
            )
        # written so that NaN fails
        falls = self.signal[1:] * self.noise[:-1] >= self.signal[:-1] * self.noise[1:]
        if not bool(falls.all() & (self.signal[1:] > 0).all() & (self.noise[:-1] > 0).all()):
            ratios = (self.noise / self.signal).tolist()
            raise ValueError(
                "noise / signal must be positive, fall from point to point and end at 0 at the "
                f"lowest; got {', '.join(f'{ratio:g}' for ratio in ratios)}"
            )

    @classmethod
    def of_sigmas(cls, timesteps: Tensor, sigmas: Tensor) -> Points:
        """Points at sigma = noise / signal, [S + 1], with signal^2 + noise^2 = 1."""
        sigmas = sigmas.detach().double().cpu()
        signal = (1 + sigmas.square()).rsqrt()
        return cls(timesteps, signal, torch.where(sigmas.isinf(), 1.0, sigmas * signal))

    @classmethod
    def down(cls, schedule: Schedule, timesteps: Sequence[float], update: Update) -> Points:
        """Down ``timesteps``, which descend: to x_0, or with ``final_alpha_one=False`` to index 0.

        A model of flow matching is at sigma = t / T; its x is (1 - sigma) x0 + sigma eps.
        """
        t = torch.tensor(list(timesteps), dtype=torch.float64)
        if update.prediction_type == "flow_prediction":
            total = schedule.num_train_timesteps
            end = torch.zeros(1) if update.final_alpha_one else torch.full((1,), 1 / total)
            noise = torch.cat([t / total, end.double()])
            return cls(t, 1 - noise, noise)
        signal, noise = roots_at(schedule, t)
        one = torch.ones(1, dtype=torch.float64)
        ends = (one, 0 * one) if update.final_alpha_one else roots_at(schedule, 0 * one)
        return cls(t, torch.cat([signal, ends[0]]), torch.cat([noise, ends[1]]))

    def __len__(self) -> int:
        return self.timesteps.numel()

    @property
    def log_snr(self) -> list[float]:
        """lambda = log signal - log noise, of S + 1 points; -inf in pure noise, inf at x_0."""
        return [
            _log(a) - _log(s)
            for a, s in zip(self.signal.tolist(), self.noise.tolist(), strict=True)
        ]

    def since(self, first: int) -> Points:
        """The steps from number ``first`` on."""
        return Points(self.timesteps[first:], self.signal[first:], self.noise[first:])


def level_at(schedule: Schedule, t: float, prediction_type: str) -> tuple[float, float]:
    """(signal, noise) of x = signal x0 + noise eps at a timestep, whole or not."""
    if prediction_type == "flow_prediction":
        return 1 - t / schedule.num_train_timesteps, t / schedule.num_train_timesteps
    signal, noise = roots_at(schedule, torch.tensor([t], dtype=torch.float64))
    return float(signal), float(noise)


def roots_at(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(abar), sqrt(1 - abar)) at timesteps, float64 [S] each, whole or not.

    Between two whole ones log sigma is interpolated, sigma^2 = 1 / abar - 1.
    """
    abar = schedule.alphas_cumprod
    low = t.floor().long().clamp(0, len(abar) - 1)
    high = t.ceil().long().clamp(0, len(abar) - 1)
    weight = (t - low).clamp(0, 1)
    logs = log_sigmas(schedule)
    sigma = torch.lerp(logs[low], logs[high], weight).exp()
    signal = torch.where(low == high, abar[low].sqrt(), (1 + sigma.square()).rsqrt())
    return signal, torch.where(low == high, (1 - abar[low]).sqrt(), sigma * signal)


def log_sigmas(schedule: Schedule) -> Tensor:
    """log sqrt(1 / abar - 1) at every training timestep, float64 [T]."""
    abar = schedule.alphas_cumprod
    return ((1 - abar).log() - abar.log()) / 2


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
