"""Models that are no modules, models whose step cannot be captured, and what comes after those."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.bench.gpu_check.check import Context, Skipped
from stepfuse.bench.gpu_check.digits import Digits, largest


class ReadsOnHost(nn.Module):
    """Asks on the host what the timestep is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Any:
        """Of the network, once the timestep was looked at."""
        return self.inner(x, t, labels=labels) if t[0].item() >= 0 else x


class Waits(ReadsOnHost):
    """Waits for the device, which no operator tells: only the capture itself finds out."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Any:
        """Of the network, after everything before it is done."""
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return self.inner(x, t, labels=labels)


def functions(context: Context, digits: Digits) -> None:
    """A plain function around the network samples the network's images."""
    if context.stands_in and "device" not in inspect.signature(sf.Sampler).parameters:
        raise Skipped("Sampler takes no device")

    def model(x: Tensor, t: Tensor, labels: Tensor) -> Any:
        return digits.model(x, t, labels=labels)

    steps = context.sized(6, 2)
    expected = digits.draw(digits.sampler(graph=None, steps=steps), 2)
    for graph in (None, "step"):
        sampler = digits.sampler(model, graph=graph, steps=steps, device=context.device)
        images = digits.draw(sampler, 2)
        same, difference = torch.equal(images, expected), largest(images, expected)
        context.expect(same, f"a function, graph={graph!r}: off by {difference:.3g}")


def after_a_refusal(context: Context, digits: Digits) -> None:
    """A refused capture costs speed: the images are right, and the next model is captured."""
    steps = context.sized(6, 2)
    expected = digits.draw(digits.sampler(graph=None, steps=steps), 2)
    rows = []
    kinds = context.sized((ReadsOnHost, Waits), (ReadsOnHost,))
    for kind in kinds:
        sampler = digits.sampler(kind(digits.model), graph="step", steps=steps)
        refused = _right(context, f"{kind.__name__}, refused", sampler, digits, expected)
        context.expect(
            sampler.stats()["replays"] == 0, f"{kind.__name__}: its step was captured all the same"
        )
        if not context.stands_in:
            torch.cuda.empty_cache()
            default = torch.cuda.default_stream(context.device)
            restored = torch.cuda.current_stream(context.device) == default
            context.expect(restored, f"{kind.__name__}: the stream was not restored")
        second = digits.sampler(graph="step", steps=steps)
        _right(context, f"after {kind.__name__}", second, digits, expected)
        captured = second.stats()["eager_steps"] == 0
        said = second.explain().splitlines()[-1]
        context.expect(captured, f"after {kind.__name__}: not captured ({said})")
        rows.append({"model": kind.__name__, "said": refused, "captured afterwards": captured})
        context.note("refusals", rows)


def _right(
    context: Context, name: str, sampler: sf.Sampler, digits: Digits, expected: Tensor
) -> str:
    images = digits.draw(sampler, len(expected))
    same, difference = torch.equal(images, expected), largest(images, expected)
    context.expect(same, f"{name}: off by {difference:.3g}")
    return sampler.explain().splitlines()[-1]
