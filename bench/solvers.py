"""Which solver makes the digits in how many evaluations: a table, a record, and a picture.

    python -m stepfuse.bench.solvers --json solvers.json --picture solvers.png

Every solver starts from the same noise. Of each it is measured

    agreement   how many images the judge, a classifier, takes for the digit that was asked for
    frechet     the distance of Gaussians fitted to the judge's features of these images and of the
                reference's (Frechet distance, as FID has it, with 32 features)
    rms         of the pixels, from the image that the same noise becomes in the reference

The reference is UniPC of third order in 60 evaluations: where the network itself leads. The judge
is a file of Python with ``load_judge()``, whose ``layers`` end in a linear one.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from stepfuse.bench.machine import describe
from stepfuse.bench.script import console, save
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.files.images import grid, save_png, to_pixels
from stepfuse.engine.files.writing import check_file
from stepfuse.engine.networks.checkpoint import Checkpoint, load
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.kernels.limits import check_threads

SCHEMA = "stepfuse-solvers-1"
EVALUATIONS = (5, 8, 10, 15, 20)
SOLVERS: dict[str, dict[str, Any]] = {
    "DDIM": {"method": "ddim"},
    "DPM-Solver++ 2M": {"method": "dpmpp"},
    "UniPC-2": {"method": "unipc"},
    "Heun": {"method": "heun"},
}
REFERENCE = {"method": "unipc", "order": 3, "steps": 60}
SPACING = "trailing"
BATCH = 100  # images at a time
SHOWN = 10  # images of a row of the picture
PICTURED = 8  # evaluations


def steps_for(method: str, evaluations: int) -> int:
    """The most steps that take no more evaluations: Heun's are two each, but for the last."""
    return (evaluations + 1) // 2 if method == "heun" else evaluations


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features [N, F] each."""
    first, second = a.double().numpy(), b.double().numpy()
    means = first.mean(0) - second.mean(0)
    c_a, c_b = np.cov(first.T), np.cov(second.T)
    values, vectors = np.linalg.eigh(c_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ c_b @ root).clip(0)).sum()
    return max(0.0, float(means @ means + np.trace(c_a) + np.trace(c_b) - 2 * mixed))


def load_judge(path: Path) -> Any:
    """The classifier of a file of Python."""
    spec = importlib.util.spec_from_file_location("judge", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"--judge must be a file of Python with load_judge(); got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_judge()


@torch.no_grad()
def features(judge: Any, images: Tensor) -> Tensor:
    """[N, 32]: the last feature maps, averaged over their pixels."""
    maps = judge.layers[:-2](images.float())
    pooled: Tensor = maps.mean(dim=(2, 3))
    return pooled


def draw(
    checkpoint: Checkpoint, model: Any, count: int, seed: int, **settings: Any
) -> tuple[Tensor, Sampler]:
    """Images [N, 1, 32, 32] of the digits in turn, and the sampler that made them."""
    sampler = Sampler(
        model,
        checkpoint.schedule,
        prediction_type=checkpoint.prediction_type,
        spacing=SPACING,
        **settings,
    )
    shape, labels = (count, *checkpoint.sample_shape), {"labels": torch.arange(count) % 10}
    return sampler.sample(shape, seed=seed, batch_size=BATCH, condition=labels), sampler


def measured(checkpoint: Checkpoint, judge: Any, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row for the reference, then one for each solver and number of evaluations.

    "images" are those of the picture, or None.
    """
    labels = torch.arange(count) % 10
    first = min(count, BATCH)
    images = torch.zeros(first, *checkpoint.sample_shape)
    example = (images, torch.zeros(first, dtype=torch.int64), {"labels": labels[:first]})
    model = optimize(checkpoint.model, example)
    exact, sampler = draw(checkpoint, model, count, seed, **REFERENCE)
    wanted = features(judge, exact)

    def row(name: str, images: Tensor, sampler: Sampler) -> dict[str, Any]:
        return {
            "solver": name,
            "evaluations": sampler.num_function_evaluations,
            "agreement": judge.agreement(images, labels),
            "frechet": frechet(features(judge, images), wanted),
            "rms": float((images - exact).square().mean().sqrt()),
            "images": images[:SHOWN],
        }

    yield row("reference", exact, sampler)
    for name, settings in SOLVERS.items():
        for evaluations in EVALUATIONS:
            steps = steps_for(settings["method"], evaluations)
            images, sampler = draw(checkpoint, model, count, seed, steps=steps, **settings)
            made = row(name, images, sampler)
            if evaluations != PICTURED:
                made["images"] = None
            yield made


def shown(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    table = Table("solver", "evaluations", "agreement", "frechet", "rms")
    for row in rows:
        table.add_row(
            row["solver"],
            str(row["evaluations"]),
            f"{100 * row['agreement']:.1f} %",
            f"{row['frechet']:.3f}",
            f"{row['rms']:.4f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and leave the record and the picture where they are asked for."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--json", type=Path, help="write what was measured, and on what, here")
    options.add_argument("--picture", type=Path, help="ten digits of every solver, as PNG")
    options.add_argument("--count", type=int, default=1000, help="images of each (default 1000)")
    options.add_argument("--seed", type=int, default=0, help="of their noise (default 0)")
    options.add_argument("--threads", type=int, help="threads of torch and of ours")
    options.add_argument(
        "--judge", type=Path, default=Path("tests/data/judge.py"), help="file with load_judge()"
    )
    given = options.parse_args(arguments)
    try:
        check_threads("--threads", given.threads)
        if given.count < 2 * SHOWN:
            raise ValueError(f"--count must be at least {2 * SHOWN}; got {given.count}")
        for path in filter(None, (given.json, given.picture)):
            check_file(path)
        judge = load_judge(given.judge)
    except (ValueError, OSError) as error:
        options.error(str(error))
    if given.threads:
        torch.set_num_threads(given.threads)
    found = list(measured(load("digits"), judge, given.count, given.seed))
    pictured = [row.pop("images") for row in found]
    console().print(shown(found))
    save(
        given.json,
        {
            "schema": SCHEMA,
            "machine": asdict(describe()),
            "count": given.count,
            "seed": given.seed,
            "spacing": SPACING,
            "reference": REFERENCE,
            "solvers": SOLVERS,
            "rows": found,
        },
    )
    if given.picture:
        images = torch.cat([row for row in pictured if row is not None])
        save_png(given.picture, grid(to_pixels(images), SHOWN))


if __name__ == "__main__":
    main()
