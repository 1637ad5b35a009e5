"""``stepfuse train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stepfuse.engine.cli.errors import USAGE, choosing_places, failing_on, interruptible
from stepfuse.engine.cli.models import choose_device
from stepfuse.engine.cli.printing import wrote
from stepfuse.engine.networks.unet import UNetConfig
from stepfuse.engine.training.config import TrainConfig, keras_config
from stepfuse.engine.training.loop import train
from stepfuse.engine.training.place import STATE, check_place

PRESETS = {
    "digits": UNetConfig.digits,
    "ddpm_cifar10": UNetConfig.ddpm_cifar10,
    "adm64": UNetConfig.adm64,
}


def train_command(
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder of images (or of one folder per class), or .npz with 'images' uint8 "
            "or uint16 [N, H, W(, C)] and optional 'labels'. Images are used at the size they have."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for state.pt, sample grids and the finished model.safetensors."),
    ],
    background: Annotated[
        Literal["white", "black"], typer.Option(help="What transparent pictures are laid on.")
    ] = "white",
    network: Annotated[
        Literal["digits", "ddpm_cifar10", "adm64"],
        typer.Option(help="Network; image channels and classes come from the data."),
    ] = "digits",
    objective: Annotated[
        Literal["simple", "keras"],
        typer.Option(
            help="simple: DDPM's. keras: that of Keras' DDIM example, with its settings: angles "
            "for a schedule, normalised images, absolute errors at continuous times."
        ),
    ] = "simple",
    prediction: Annotated[
        Literal["epsilon", "v_prediction"], typer.Option(help="Training target.")
    ] = "epsilon",
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, after the warm-up.")] = 1e-3,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of linear warm-up. Default: 200; 0 with keras.", show_default=False
        ),
    ] = None,
    decay: Annotated[
        Literal["none", "linear", "cosine"] | None,
        typer.Option(
            help="Fall of the learning rate to 0. Default: cosine; none with keras.",
            show_default=False,
        ),
    ] = None,
    label_dropout: Annotated[
        float, typer.Option(help="Probability of training without the label, for guidance.")
    ] = 0.1,
    ema_decay: Annotated[
        float | None,
        typer.Option(
            help="Of the moving average of the weights. Default: 0.9999; 0.999 with keras.",
            show_default=False,
        ),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between saved states.")] = 500,
    sample_every: Annotated[int, typer.Option(help="Steps between sample grids; 0: none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of weights, order, noise and dropout.")] = 0,
    autocast: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--fp32", help="bfloat16 autocast; default: where the device multiplies it."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Train a U-Net on your images. Ctrl-C saves and stops; --resume continues bit for bit."""
    settings: dict[str, Any] = {
        "prediction_type": prediction,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "label_dropout": label_dropout,
        "save_every": save_every,
        "sample_every": sample_every,
        "seed": seed,
        "autocast": autocast,
        "device": str(choose_device(device)),
        "resume": resume,
        "background": background,
    }
    own = {"warmup_steps": warmup_steps, "decay": decay, "ema_decay": ema_decay}
    settings |= {name: value for name, value in own.items() if value is not None}
    make = keras_config if objective == "keras" else TrainConfig
    config = make(data, out, unet=PRESETS[network](), **settings)

    def left() -> str:
        saved = (out / STATE).is_file()
        return f"continue with: --out {out} --resume" if saved else "nothing was saved yet"

    less = (
        f"fewer images per step (--batch-size, now {batch_size}) or a smaller --network need less"
    )
    with choosing_places():
        check_place(config)
    with interruptible(left, less), failing_on(FileNotFoundError, status=USAGE):
        path = train(config, progress=True)
    wrote(path)
    print(f"wrote {path}")
