"""What a training run consists of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from stepfuse.engine.networks.unet import UNetConfig
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.training.pictures import BACKGROUNDS, Background

Objective = Literal["simple", "keras"]
FREE_ON_RESUME = ("data", "out", "steps", "save_every", "sample_every", "resume", "device")
MOST_STEPS, MOST_IMAGES = 10**9, 10**6


@dataclass(frozen=True)
class TrainConfig:
    """A training run; raises ValueError for values that cannot be used.

    Attributes:
        data: folder of images or .npz file, see ``load_images``.
        out: folder for ``state.pt``, ``samples_*.png`` and the finished ``model.safetensors``.
        unet: the network. Image channels and number of classes are taken from the data.
        schedule: the forward process.
        prediction_type: "epsilon" or "v_prediction"; "epsilon" with a learned variance.
        objective: "simple", L_simple or with a learned variance L_hybrid; or "keras", the mean
            absolute error of Keras' DDIM example (`keras_config` has all of its settings).
        steps: optimiser steps in all; the learning rate's decay is laid over them.
        batch_size: images per step.
        learning_rate: AdamW's, after the warm-up.
        warmup_steps: the learning rate rises linearly over these.
        decay: the learning rate falls to zero over the remaining steps, or stays ("none").
        weight_decay: AdamW's.
        grad_clip: largest gradient norm.
        ema_decay, ema_warm_up: see ``EMA``.
        label_dropout: probability of the null class, for classifier-free guidance.
        autocast: bfloat16 autocast; None where the device has bfloat16 arithmetic.
        save_every: steps between saved states.
        sample_every: steps between sample grids, 0 for none.
        seed: of the initial weights, the data order, noise, timesteps and dropout.
        device: "cpu" or "cuda".
        resume: continue from ``out/state.pt``.
        background: what transparent pictures are laid on, "white" or "black".
    """

    data: Path
    out: Path
    unet: UNetConfig = field(default_factory=UNetConfig.digits)
    schedule: Schedule = field(default_factory=Schedule.linear)
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    objective: Objective = "simple"
    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay: Literal["none", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    ema_warm_up: bool = True
    label_dropout: float = 0.1
    autocast: bool | None = None
    save_every: int = 500
    sample_every: int = 1000
    seed: int = 0
    device: str = "cpu"
    resume: bool = False
    background: Background = "white"

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("steps", 1 <= self.steps <= MOST_STEPS, f"at least 1, at most {MOST_STEPS}"),
            (
                "batch_size",
                1 <= self.batch_size <= MOST_IMAGES,
                f"at least 1, at most {MOST_IMAGES}",
            ),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("decay", self.decay in ("none", "linear", "cosine"), "'none', 'linear' or 'cosine'"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("grad_clip", self.grad_clip > 0, "above 0"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
            ("label_dropout", 0 <= self.label_dropout <= 1, "in [0, 1]"),
            ("objective", self.objective in get_args(Objective), "'simple' or 'keras'"),
            ("save_every", self.save_every >= 1, "at least 1"),
            ("sample_every", self.sample_every >= 0, "at least 0"),
            ("seed", -(2**63) <= self.seed < 2**64, "64 bits"),
            ("background", self.background in BACKGROUNDS, " or ".join(map(repr, BACKGROUNDS))),
            (
                "prediction_type",
                self.prediction_type in self.possible_prediction_types(),
                " or ".join(map(repr, self.possible_prediction_types())),
            ),
        ]
        for name, good, accepted in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}")
        if self.objective == "keras":
            self._check_keras()

    def _check_keras(self) -> None:
        unfit = {
            "prediction_type": self.prediction_type != "epsilon",
            "unet": self.unet.embedding_input != "noise_variance" or self.unet.learned_variance,
            "schedule": self.schedule != Schedule.keras(self.schedule.num_train_timesteps),
        }
        for name, wrong in unfit.items():
            if wrong:
                raise ValueError(
                    f"{name} is not that of objective 'keras'; accepted: 'epsilon', a network with "
                    "embedding_input='noise_variance' and no learned variance, Schedule.keras(T)"
                )

    def possible_prediction_types(self) -> tuple[str, ...]:
        """The hybrid loss is written for epsilon."""
        return ("epsilon",) if self.unet.learned_variance else ("epsilon", "v_prediction")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as plain values."""
        values = asdict(self)
        values["schedule"] = self.schedule.betas.tolist()
        values["unet"] = asdict(self.unet)
        return {name: value for name, value in values.items() if name not in FREE_ON_RESUME}


def keras_config(data: Path, out: Path, *, unet: UNetConfig, **changes: Any) -> TrainConfig:
    """A run with the settings of Keras' DDIM example, on this network fed with noise variances.

    AdamW at 1e-3 and 1e-4 of weight decay, without warm-up, decay or clipping of gradients; an
    average of decay 0.999 from the start; 16 + 16 sinusoids. ``changes`` are other fields.
    """
    fed = replace(unet, embedding_input="noise_variance", embedding_features=32)
    settings = {
        "schedule": Schedule.keras(),
        "objective": "keras",
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "decay": "none",
        "weight_decay": 1e-4,
        "grad_clip": math.inf,
        "ema_decay": 0.999,
        "ema_warm_up": False,
    }
    return TrainConfig(data=data, out=out, unet=fed, **{**settings, **changes})
