"""denoise_step against diffusers' schedulers, plain torch, torch.compile, and a copy.

    python -m stepfuse.bench.bench_denoise_step [--json FILE] [--match TEXT] [--device cuda]

DDIM with eta 0 (no noise) against `DDIMScheduler.step`, DDPM with its noise drawn inside against
`DDPMScheduler.step`. The DDIM results are compared with diffusers' own before anything is timed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfuse.bench import harness, peers_setup
from stepfuse.bench.suite import Timed
from stepfuse.engine.sampling.plan import step_table
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.timesteps import spaced_timesteps
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.step_row import Column

TITLE = "denoise_step: one DDIM (eta 0) or DDPM (noise drawn inside) update"
SHAPES = [
    ("one image", (1, 3, 32, 32)),
    ("DDPM-CIFAR", (64, 3, 32, 32)),
    ("ADM-64", (64, 3, 64, 64)),
    ("SD-1.5", (8, 4, 64, 64)),
]
STEPS, ROW = 50, 20  # a step in the middle of 50
# float32 arithmetic on coefficients up to 2; diffusers does its own in float32 too, in another
# order, from a schedule it accumulated in float32
TOLERANCE, PEER_TOLERANCE = 4e-6, 5e-5
COLUMNS = {"diffusers": "vs diffusers", "eager": "vs eager", "compile": "vs compile"}


def _tables() -> dict[str, Tensor]:
    schedule, timesteps = Schedule.linear(), spaced_timesteps(1000, STEPS)
    updates = {
        "ddim": Update("ddim", clip_sample=1.0, rederive_epsilon=False),
        "ddpm": Update("ddpm", clip_sample=1.0),
    }
    return {name: step_table(schedule, timesteps, update) for name, update in updates.items()}


def expression(row: Tensor, noisy: bool) -> Callable[[dict[str, Any]], Tensor]:
    """The update in plain torch with its coefficients as Python numbers: no lookups to pay for."""
    p_x, p_o, c_x, c_o, c_0, sigma, clip = row[:7].tolist()

    def update(inputs: dict[str, Any]) -> Tensor:
        x, o = inputs["x"], inputs["output"]
        x0 = (p_x * x + p_o * o).clamp(-clip, clip)
        x_s = c_x * x + c_o * o + c_0 * x0
        return x_s + sigma * torch.randn_like(x) if noisy else x_s

    return update


def _peer(method: str, timestep: int) -> Callable[[dict[str, Any]], Tensor] | None:
    """diffusers' step at the same timestep, or None where diffusers is not installed."""
    peers_setup.prepare()
    try:
        from diffusers import DDIMScheduler, DDPMScheduler
    except ImportError:
        return None
    scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[method]()
    scheduler.set_timesteps(STEPS)
    return lambda inputs: scheduler.step(inputs["output"], timestep, inputs["x"]).prev_sample


def case(
    model: str, shape: tuple[int, ...], dtype: torch.dtype, method: str, device: str = "cpu"
) -> harness.Case:
    """One shape, dtype and method."""
    table = _tables()[method]
    timestep, noisy = int(table[ROW, Column.TIMESTEP]), method == "ddpm"
    plain = expression(table[ROW], noisy)
    table, step = table.to(device), torch.tensor([ROW], device=device)
    table32 = table.float()
    noise: dict[str, Any] = {}
    if noisy:
        noise = {
            "seed": torch.full(shape[:1], 7, device=device),
            "sample": torch.arange(shape[0], device=device),
        }
    peer = _peer(method, timestep)

    def make() -> dict[str, Any]:
        x, output = torch.randn(2, *shape, device=device).to(dtype)
        return {"x": x, "output": output, "buffer": torch.empty_like(x)}

    def ours(inputs: dict[str, Any]) -> Any:
        return denoise_step(inputs["x"], inputs["output"], table32, step, **noise)

    def into(inputs: dict[str, Any]) -> Any:
        return denoise_step(
            inputs["x"], inputs["output"], table32, step, out=inputs["buffer"], **noise
        )

    def verify() -> None:
        inputs = make()
        x, output = inputs["x"].double(), inputs["output"].double()
        exact = denoise_step(x, output, table, step, backend="reference", **noise)
        harness.assert_close(ours(inputs), exact, TOLERANCE, "denoise_step")
        if peer is not None and not noisy and dtype == torch.float32:
            harness.assert_close(peer(inputs), exact, PEER_TOLERANCE, "diffusers")

    candidates: dict[str, Callable[[dict[str, Any]], Any]] = {
        harness.OURS: ours,
        harness.INTO: into,
    }
    candidates["eager"] = plain
    if peer is not None:
        candidates["diffusers"] = peer
    traffic = 3 * torch.Size(shape).numel() * dtype.itemsize
    label = f"{model} {'x'.join(map(str, shape))}"
    return harness.Case(label, dtype, make, candidates, traffic, verify, plain, method, device)


def cases(device: str = "cpu") -> Iterator[harness.Case]:
    """Every case, made when its turn comes."""
    for (model, shape), dtype, method in itertools.product(
        SHAPES, (torch.float32, torch.bfloat16), ("ddim", "ddpm")
    ):
        yield case(model, shape, dtype, method, device)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "shape"), SHAPES)
def test_denoise_step(
    timed: Timed, model: str, shape: tuple[int, ...], dtype: torch.dtype, method: str
) -> None:
    timed.case(case(model, shape, dtype, method))


main = functools.partial(harness.run, TITLE, cases, COLUMNS)

if __name__ == "__main__":
    main()
