"""What the capture lint says without a GPU is what a capture does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.parts import each, in_a_line
from stepfuse.engine.replay.capture import CaptureRefused
from stepfuse.engine.sampling.lint import check_capturable

SHAPE = (2, 4, 8, 8)
Forward = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """A convolution and a buffer, and what ``does`` makes of them."""

    def __init__(self, does: Forward) -> None:
        super().__init__()
        self.does = does
        self.conv = nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1)
        self.rows: Tensor
        self.register_buffer("rows", torch.linspace(0.5, 1.5, 1000))
        self.scale = [torch.full((SHAPE[1], 1, 1), 0.5)]  # no buffer: stays on the CPU

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Of ``does``."""
        return self.does(self, x, t)


def _column(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


def _in_place(model: Model, x: Tensor, t: Tensor) -> Tensor:
    y = model.conv(x)
    y[:, 1:].mul_(0.5)
    return y


def _number(model: Model, x: Tensor, t: Tensor) -> Tensor:
    y = model.conv(x)
    y[..., ::2] = 0
    return y


ALLOWED: dict[str, Forward] = {
    "a convolution": lambda m, x, t: m.conv(x),
    "a row of a buffer": lambda m, x, t: x * _column(m.rows[t]),
    "where": lambda m, x, t: torch.where(_column(t) > 500, m.conv(x), x),
    "masked_fill": lambda m, x, t: x.masked_fill(x.abs() > 2, 0.0),
    "new tensors on the device": lambda m, x, t: x + torch.linspace(0, 1, 8, device=x.device),
    "random numbers": lambda m, x, t: x + 0 * torch.rand_like(x),
    "a sort": lambda m, x, t: x.sort(dim=-1).values,
    "in place on its own result": _in_place,
    "attention": lambda m, x, t: nn.functional.scaled_dot_product_attention(x, x, x),
}
REFUSED: dict[str, Forward] = {
    "item()": lambda m, x, t: x * t[0].item(),
    "a branch on a tensor": lambda m, x, t: x if t[0] > 5 else -x,
    "a mask as index": lambda m, x, t: x + x[x > 0].sum(),
    "nonzero": lambda m, x, t: x + x.nonzero().sum(),
    "cpu()": lambda m, x, t: x * t.cpu().to(x.device)[0],
    "a tensor of the CPU": lambda m, x, t: x * m.scale[0],
    "a copy from the CPU": lambda m, x, t: x * m.scale[0].to(x.device),
}
# a graph takes these, and keeps the number: refused for those numbers that change
FROZEN: dict[str, Forward] = {
    "a number written into a slice": _number,
    "a number in a tensor of the CPU": lambda m, x, t: x * torch.tensor(3.0),
}
# copies between CPU and GPU are ordinary operations where all is on the CPU
OF_DEVICES = ("cpu()", "a tensor of the CPU", "a copy from the CPU")


def run(context: Context) -> None:
    """Those that are allowed first: a refused capture may leave the process without captures."""
    rows: list[dict[str, Any]] = []
    parts = {}
    for models in (ALLOWED, FROZEN, REFUSED):
        for name, does in models.items():
            parts[name] = partial(_compare, context, rows, name, does)
    each(context, parts)


def _compare(context: Context, rows: list[dict[str, Any]], name: str, does: Forward) -> None:
    torch.manual_seed(0)
    model = Model(does).to(context.device).eval()
    sampler = sf.Sampler(model, sf.Schedule.linear(), graph="step", steps=3)
    lint = _lint(sampler)
    captured, happened = _sampled(sampler)
    rows.append({"model": name, "lint": lint or "allows it", "the sampler": happened})
    context.note("models", rows)
    context.expect((not lint) == (name in ALLOWED), f"{name}: the lint says {lint or 'nothing'!r}")
    if name in FROZEN or (context.stands_in and name in OF_DEVICES):
        return
    if not lint:
        context.expect(captured, f"{name}: the lint allows it; the sampler: {happened}")
    else:
        context.expect(not captured, f"{name}: refused by the lint, and captured all the same")


def _lint(sampler: sf.Sampler) -> str:
    """Why not, in a line; empty where the step may be captured."""
    try:
        check_capturable(sampler, SHAPE)
    except CaptureRefused as reason:
        return str(reason).partition("\n")[0]
    return ""


def _sampled(sampler: sf.Sampler) -> tuple[bool, str]:
    try:
        images = sampler.sample(SHAPE)
    except Exception as error:
        return False, in_a_line(error)
    if sampler.stats()["replays"] and not sampler.stats()["eager_steps"]:
        return True, "captured" if bool(images.isfinite().all()) else "captured, not finite"
    return False, sampler.explain().splitlines()[-1]


CHECK = Check(
    "lint",
    "correctness",
    15.0,
    run,
    "Models that `check_capturable` allows are captured; those that it refuses are not.",
)
