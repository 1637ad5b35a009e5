"""The training loop."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from stepfuse.engine.files.reading import reason
from stepfuse.engine.files.signals import kept, terminating
from stepfuse.engine.networks.checkpoint import Checkpoint, save
from stepfuse.engine.networks.unet import UNet
from stepfuse.engine.training.config import TrainConfig
from stepfuse.engine.training.data import ImageData, load_images
from stepfuse.engine.training.ema import EMA
from stepfuse.engine.training.keras import SAMPLING, KerasObjective, normalization_of
from stepfuse.engine.training.loss import HybridLoss, simple_loss
from stepfuse.engine.training.place import MODEL, STATE, check_place, prepare
from stepfuse.engine.training.preview import save_preview
from stepfuse.engine.training.state import load_state, save_state
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.limits import check_memory

LOSS_SMOOTHING = 0.99


def train(config: TrainConfig, progress: bool = False) -> Path:
    """Train a U-Net and write its averaged weights to ``config.out/model.safetensors``.

    Each step draws t uniformly, noises the batch by x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    (``add_noise``), replaces labels by the null class with ``label_dropout``, takes a gradient step
    on L_simple (L_hybrid with a learned variance, `KerasObjective` where it is asked for) and
    updates the moving average.

    The state is saved every ``save_every`` steps and on Ctrl-C or SIGTERM, which end the run after
    the step at hand with KeyboardInterrupt. A resumed run continues bit for bit.

    Everything that can be refused is refused before the first step: data, a state of another run,
    and a place that cannot be written to.

    Args:
        config: the run.
        progress: say what the data are, and show a bar with the smoothed loss and images per
            second, on stderr.

    Raises:
        ValueError: data, state or sizes that cannot be used.
        OSError: data or a folder that is missing, cannot be read or cannot be written to.
    """
    check_place(config)
    data = load_images(config.data, config.background)
    if progress:
        print(*describe(data), sep="\n", file=sys.stderr)
    run = Run(config, data)
    state_file = config.out / STATE
    if config.resume:
        run.restore(load_state(state_file, run.identity()))
    prepare(config.out, run.state_bytes())

    bar = tqdm(
        total=config.steps * config.batch_size,
        initial=run.step * config.batch_size,
        unit=" images",
        unit_scale=True,
        smoothing=0.05,
        disable=not progress,
    )
    with terminating(), bar, kept() as signals:
        ending = False
        while run.step < config.steps and not ending:
            run.advance()
            bar.update(config.batch_size)
            bar.set_postfix(**run.figures(), step=run.step, refresh=False)
            if config.sample_every and run.step % config.sample_every == 0:
                path = config.out / f"samples_{run.step:07d}.png"
                save_preview(path, run.result(), config.seed)
            ending = bool(signals.pending)
            if run.step % config.save_every == 0 or ending or run.step == config.steps:
                save_state(state_file, run.state())
    if ending:
        raise KeyboardInterrupt  # where a handler of the caller's own took the signal
    return run.export()


def describe(data: ImageData) -> list[str]:
    """What was read, in a line, and the remarks."""
    channels, height, width = data.sample_shape
    bits = 16 if data.images.dtype == torch.uint16 else 8
    classes = f", {len(data.class_names)} classes" if data.class_names else ""
    colours = "grey" if channels == 1 else f"{channels} channels"
    what = f"{len(data)} images of {height}x{width}, {colours}, {bits} bits{classes}"
    return [what, *data.remarks]


class Run:
    """A training run between two steps: network, average, optimiser, randomness, counters."""

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        classes = None if data.labels is None else len(data.class_names)
        unet = replace(config.unet, in_channels=data.sample_shape[0], num_classes=classes)
        divisor = unet.size_divisor
        if data.sample_shape[1] % divisor or data.sample_shape[2] % divisor:
            raise ValueError(
                f"images are {data.sample_shape[1]} by {data.sample_shape[2]}; accepted by this "
                f"network: height and width divisible by {divisor}"
            )
        # x0, noise, x_t and target in float32 are the least that a step holds
        values = config.batch_size * math.prod(data.sample_shape)
        check_memory(f"batch_size {config.batch_size}", 4 * 4 * values)
        torch.manual_seed(config.seed)
        self.config = config
        self.data = data
        self.model = UNet(unet).to(config.device)
        self.model.follow(config.schedule)
        self.ema = EMA(self.model, config.ema_decay, config.ema_warm_up)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.hybrid = HybridLoss(config.schedule) if unet.learned_variance else None
        self.keras = None
        if config.objective == "keras":
            self.keras = KerasObjective(normalization_of(data))
        self.abar = config.schedule.alphas_cumprod.to(config.device)
        self.autocast = has_bfloat16(config.device) if config.autocast is None else config.autocast
        self.step = 0
        self.loss = self.image_loss = math.nan

    def advance(self) -> None:
        """One optimiser step."""
        config = self.config
        indices = batch_indices(self.step, len(self.data), config.batch_size, config.seed)
        x0, labels = self.data.batch(indices)
        t = self.times(len(x0))
        noise = torch.randn(x0.shape, generator=self.generator)
        if labels is not None:
            null = len(self.data.class_names)
            labels = drop_labels(labels, null, config.label_dropout, self.generator)
            labels = labels.to(config.device)
        x0, noise, t = x0.to(config.device), noise.to(config.device), t.to(config.device)

        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(self.step, config)
        self.optimizer.zero_grad()
        loss = self.losses(x0, noise, t, labels).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.model)

        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at step {self.step}")
        self.loss = _smoothed(self.loss, value)
        self.step += 1

    def times(self, count: int) -> Tensor:
        """Where the images of a batch are noised to: timesteps, or Keras' continuous times."""
        if self.keras is not None:
            return self.keras.times(count, self.generator)
        total = self.config.schedule.num_train_timesteps
        return torch.randint(total, (count,), generator=self.generator)

    def figures(self) -> dict[str, str]:
        """The smoothed losses, to be shown."""
        shown = {"loss": f"{self.loss:.4f}"}
        return shown if self.keras is None else {**shown, "image": f"{self.image_loss:.4f}"}

    def losses(self, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The objective per sample, [N]."""
        if self.keras is not None:
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.autocast):
                errors, image = self.keras.errors(self.model, x0, noise, t, labels)
            self.image_loss = _smoothed(self.image_loss, float(image.mean()))
            return errors
        kind = self.config.prediction_type
        x_t, target = add_noise(x0, noise, t, self.abar, target=kind)
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(x_t, t, labels)
        if self.hybrid is None:
            return simple_loss(output, target)
        return self.hybrid(output, noise, x0, x_t, t)

    def averaged(self) -> UNet:
        """A copy of the network with the averaged weights, for evaluation."""
        model = UNet(self.model.config).to(self.config.device)
        model.follow(self.config.schedule)
        self.ema.copy_to(model)
        return model.eval().requires_grad_(False)

    def result(self) -> Checkpoint:
        """The checkpoint of the averaged weights."""
        training: dict[str, Any] = {
            "steps": self.step,
            "images": self.step * self.config.batch_size,
            "loss": round(self.loss, 6),
        }
        more: dict[str, Any] = {}
        if self.keras is not None:
            training["image_loss"] = round(self.image_loss, 6)
            more = {"normalization": self.keras.normalization, "sampling": SAMPLING}
        return Checkpoint(
            model=self.averaged(),
            schedule=self.config.schedule,
            prediction_type=self.config.prediction_type,
            sample_shape=self.data.sample_shape,
            labels=self.data.class_names,
            training=training,
            card="",
            **more,
        )

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed: settings, and what the data decide."""
        channels, height, width = self.data.sample_shape
        decided = {
            "classes": list(self.data.class_names),
            "channels": channels,
            "image_size": f"{height}x{width}",
        }
        return self.config.identity() | decided

    def state_bytes(self) -> int:
        """About the size of a saved state: weights, their average and AdamW's two moments."""
        return 4 * sum(p.numel() * p.element_size() for p in self.model.parameters())

    def state(self) -> dict[str, object]:
        """Everything that ``restore`` needs to continue bit for bit."""
        more = {} if self.keras is None else {"image_loss": self.image_loss}
        return {
            **more,
            "identity": self.identity(),
            "step": self.step,
            "loss": self.loss,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, object]) -> None:
        """Take over a state that ``load_state`` read."""
        try:
            self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
            self.ema.load_state_dict(state["ema"])  # type: ignore[arg-type]
            self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
            self.generator.set_state(state["generator"])  # type: ignore[arg-type]
            torch.set_rng_state(state["rng"])  # type: ignore[arg-type]
            self.step = int(state["step"])  # type: ignore[call-overload]
            self.loss = float(state["loss"])  # type: ignore[arg-type]
            self.image_loss = float(state.get("image_loss", math.nan))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the saved state does not fit this run: {reason(error)}; start a run of its own "
                "in another folder (out)"
            ) from None

    def export(self) -> Path:
        """Write the averaged weights as a checkpoint that ``stepfuse.load`` reads."""
        path, made = self.config.out / MODEL, self.result()
        save(
            path,
            made.model,
            made.schedule,
            prediction_type=made.prediction_type,
            sample_shape=made.sample_shape,
            labels=made.labels,
            training=made.training,
            normalization=made.normalization,
            sampling=made.sampling,
        )
        return path


def _smoothed(before: float, value: float) -> float:
    """Over about a hundred steps; the first is taken as it is."""
    if math.isnan(before):
        return value
    return LOSS_SMOOTHING * before + (1 - LOSS_SMOOTHING) * value


def batch_indices(step: int, count: int, batch_size: int, seed: int) -> Tensor:
    """The images of one step, int64 [batch_size]: consecutive entries of one shuffle per epoch."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return torch.stack([_shuffle(p // count, count, seed)[p % count] for p in positions])


@lru_cache(maxsize=2)
def _shuffle(epoch: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed + 0x9E3779B9 * (epoch + 1)) % 2**64)
    return torch.randperm(count, generator=generator)


def drop_labels(
    labels: Tensor, null: int, probability: float, generator: torch.Generator
) -> Tensor:
    """Each label replaced by the null class with the given probability (Ho and Salimans 2021)."""
    dropped = torch.rand(labels.shape, generator=generator) < probability
    return torch.where(dropped, torch.full_like(labels, null), labels)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant or falling to zero at ``config.steps``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return max(0.0, 1 - done) if config.decay == "linear" else 1.0


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
