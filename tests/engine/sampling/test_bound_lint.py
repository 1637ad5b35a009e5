"""A bound's step on fake CUDA tensors: nothing in it that a CUDA graph would not survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.cli.cli_case import SIDE, TINY
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.networks.unet import UNet
from stepfuse.engine.sampling import lint
from stepfuse.engine.sampling.bound.chain import Chain
from stepfuse.engine.sampling.bound.program import BoundProgram, Pairs
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.torch_names import FakeTensorMode

CUDA = torch.device("cuda", 0)
SCHEDULE = sf.Schedule.linear(40)


def problems(model: torch.nn.Module, given_noise: bool) -> list[str]:
    """What the lint of the sampler says of the bound's step."""
    chain = Chain.of(SCHEDULE, [30, 20, 0], Update("ddpm", variance_type="fixed_large"))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), fake, lint.without_bindings(), lint._on_cuda(list(model.modules())):
        rows = torch.zeros(4, dtype=torch.int64, device=CUDA)
        x0 = torch.zeros(4, 1, SIDE, SIDE, device=CUDA)
        noise = torch.zeros_like(x0) if given_noise else None
        pairs = Pairs(rows, x0, rows, rows, {"labels": rows}, noise)
        denoiser = lint._FakeDenoiser(Denoiser(model))
        program = BoundProgram(denoiser, chain, SCHEDULE.alphas_cumprod, pairs, "exact", "auto")
        program.load(pairs)
        program.advance(False)
        with lint._Watch() as watch:
            program.advance(False)
        return [*watch.problems, *watch.outliving()]


@pytest.mark.parametrize("given_noise", [True, False])
def test_the_step_would_be_captured(given_noise: bool) -> None:
    assert problems(UNet(TINY).eval(), given_noise) == []


def test_a_step_that_would_not_be() -> None:
    class Reading(UNet):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Any:
            return super().forward(x * torch.tensor(2.0), t, labels)

    assert "has a CPU operand" in problems(Reading(TINY).eval(), False)[0]
