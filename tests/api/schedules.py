"""Schedules and timesteps."""

from __future__ import annotations

import torch
from tests.api.case import Call

import stepfuse as sf

BETAS = torch.linspace(0.01, 0.2, 6, dtype=torch.float64)
# betas may be numbers of any kind that are in [0, 1): zeros in whole numbers are, in one axis
VECTOR = {"as a list", "as an array", "as integers", "of twice the entries"}
NAME = {"a text", "an empty text"}

CALLS = {
    "Schedule": lambda: Call(
        sf.Schedule, {"betas": BETAS, "name": "mine"}, {"betas": VECTOR, "name": NAME}
    ),
    "Schedule.from_betas": lambda: Call(
        sf.Schedule.from_betas, {"betas": BETAS, "name": "mine"}, {"betas": VECTOR, "name": NAME}
    ),
    "Schedule.from_alphas_cumprod": lambda: Call(
        sf.Schedule.from_alphas_cumprod,
        {"alphas_cumprod": 1 - BETAS, "name": "mine"},
        {"alphas_cumprod": {"as a list", "as an array", "an array"}, "name": NAME},
    ),
    "Schedule.linear": lambda: Call(
        sf.Schedule.linear,
        {"num_train_timesteps": 10, "beta_start": 1e-4, "beta_end": 0.01, "rescale": True},
        {"beta_start": {"0"}, "beta_end": {"0"}},
        named={"num_train_timesteps": ("beta_end",)},
    ),
    "Schedule.scaled_linear": lambda: Call(
        sf.Schedule.scaled_linear,
        {"num_train_timesteps": 10, "beta_start": 1e-4, "beta_end": 0.01},
        {"beta_start": {"0"}, "beta_end": {"0"}},
    ),
    "Schedule.cosine": lambda: Call(
        sf.Schedule.cosine,
        {"num_train_timesteps": 10, "offset": 0.01},
        {"offset": {"0", "1.5"}},
    ),
    "Schedule.sigmoid_beta": lambda: Call(
        sf.Schedule.sigmoid_beta,
        {"num_train_timesteps": 10, "beta_start": 1e-4, "beta_end": 0.01},
        {"beta_start": {"0"}, "beta_end": {"0"}},
    ),
    "Schedule.sigmoid_alpha": lambda: Call(
        sf.Schedule.sigmoid_alpha,
        {"num_train_timesteps": 10, "start": -3.0, "end": 3.0, "tau": 1.0},
        {"start": {"-1", "0", "1.5", "2 ** 70"}, "end": {"-1", "0", "1.5"}, "tau": {"1.5"}},
    ),
    "Schedule.keras": lambda: Call(
        sf.Schedule.keras,
        {"num_train_timesteps": 10, "max_signal_rate": 0.95, "min_signal_rate": 0.02},
        {"min_signal_rate": {"0"}},
    ),
    "Schedule.zero_terminal_snr": lambda: Call(sf.Schedule.linear(50).zero_terminal_snr, {}),
    "spaced_timesteps": lambda: Call(
        sf.spaced_timesteps,
        {"num_train_timesteps": 10, "steps": 5, "spacing": "leading", "steps_offset": 1},
        {"steps_offset": {"0"}},
    ),
}
