"""An optimised network is the network: its outputs, its images, after its weights were changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import stepfuse as sf
from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.digits import Digits, comparable, largest
from stepfuse.bench.gpu_check.parts import each
from stepfuse.bench.gpu_check.textbook import Diffusion
from stepfuse.bench.verify import psnr
from stepfuse.engine.adapters.guided_diffusion import explain

TIMESTEPS = (0, 10, 500, 999)
# relative L2 of one evaluation: sums in another order, and the rounding of bfloat16 in 20 layers
MOST = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
LEAST_DB = 80.0  # of float32 images


def run(context: Context) -> None:
    """The network alone, then inside a sampler."""
    comparable()
    digits = Digits(context.device)
    parts: dict[str, Callable[[Context, Digits], None]] = {
        "float32": _evaluations,
        "weights": _weights,
        "table": _table,
        "bfloat16": partial(_evaluations, dtype=torch.bfloat16),
        "images": _images,
        "accelerated": _accelerated,
    }
    each(context, {name: partial(part, context, digits) for name, part in parts.items()})


def _inputs(digits: Digits, t: int, count: int = 4) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(digits.shape(count), generator=generator).to(digits.device)
    return x, torch.full((count,), t, device=digits.device), digits.condition(count)


def _call(model: Any, inputs: tuple[Any, ...]) -> Tensor:
    x, t, condition = inputs
    with torch.no_grad():
        result: Tensor = model(x, t, **condition)
    return result


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _evaluations(context: Context, digits: Digits, dtype: torch.dtype = torch.float32) -> None:
    name = str(dtype).removeprefix("torch.")
    fast = sf.optimize(digits.model, _inputs(digits, 0), dtype)
    errors = {}
    for t in TIMESTEPS:
        inputs = _inputs(digits, t)
        errors[f"t={t}"] = error = _distance(_call(fast, inputs), _call(digits.model, inputs))
        context.expect(
            error <= MOST[dtype], f"{name}, t={t}: relative L2 {error:.2g}, above {MOST[dtype]:g}"
        )
    context.note(f"relative L2, {name}", errors)
    context.note(f"passes, {name}", [str(report) for report in fast.reports])


def _weights(context: Context, digits: Digits) -> None:
    """A changed weight is noticed, and in force after `refresh`."""
    model = copy.deepcopy(digits.model)
    inputs = _inputs(digits, 500)
    fast = sf.optimize(model, inputs)
    before = _call(fast, inputs)
    model.load_state_dict({name: 1.02 * v for name, v in model.state_dict().items()})
    try:
        _call(fast, inputs)
    except sf.WeightsChanged:
        pass
    else:
        context.expect(False, "changed weights were not noticed")
    fast.refresh()
    after, expected = _call(fast, inputs), _call(model, inputs)
    error = _distance(after, expected)
    context.expect(error <= MOST[torch.float32], f"after refresh(): relative L2 {error:.2g}")
    context.expect(_distance(after, before) > 1e-3, "refresh() changed nothing")


def _table(context: Context, digits: Digits) -> None:
    """Rows that were announced are what is computed without an announcement."""
    inputs = _inputs(digits, 500)
    computed = _call(sf.optimize(digits.model, inputs), inputs)
    fast = sf.optimize(digits.model, inputs, timesteps=(10, 500))
    error = _distance(_call(fast, inputs), computed)
    context.expect(error <= MOST[torch.float32], f"a row of the table: relative L2 {error:.2g}")
    other = _inputs(digits, 77)
    error = _distance(_call(fast, other), _call(digits.model, other))
    context.expect(
        error <= MOST[torch.float32], f"a timestep that was not announced: relative L2 {error:.2g}"
    )


def _images(context: Context, digits: Digits) -> None:
    """An optimised sampler, captured and not, against the network as it is."""
    count, steps = context.sized(8, 2), context.sized(20, 3)
    plain = digits.draw(digits.sampler(graph=None, steps=steps), count)
    eager = digits.draw(digits.sampler(graph=None, steps=steps, optimize=True), count)
    sampler = digits.sampler(graph="step", steps=steps, optimize=True)
    captured = digits.draw(sampler, count)
    decibels = psnr(captured.cpu(), plain.cpu())
    context.note("PSNR of float32 images", decibels)
    context.expect(decibels >= LEAST_DB, f"images: {decibels:.1f} dB, below {LEAST_DB:g}")
    difference = largest(captured, eager)
    context.expect(difference == 0, f"captured differs from un-captured by {difference:.3g}")
    said = sampler.explain().splitlines()[-1]
    context.expect(sampler.stats()["eager_steps"] == 0, f"images: not captured ({said})")


def _accelerated(context: Context, digits: Digits) -> None:
    """The loops of an accelerated diffusion draw what they drew before, from the same seed."""
    count, rows = context.sized(8, 2), {}
    diffusion = Diffusion(sf.Schedule.linear(context.sized(40, 4), rescale=False))
    for name, options in (("p_sample_loop", {}), ("ddim_sample_loop", {"eta": 0.5})):
        images = partial(_looped, diffusion, name, digits, count, options)
        theirs = images()
        sf.accelerate(diffusion)
        accelerated = images()
        replaced, *reasons = explain(diffusion).splitlines()
        context.expect(
            name in replaced.replace(",", "").split(), f"{name} was not replaced: {reasons}"
        )
        sf.restore(diffusion)
        rows[name] = decibels = psnr(accelerated.cpu(), theirs.cpu())
        context.note("PSNR of accelerated loops", rows)
        context.expect(
            decibels >= LEAST_DB, f"{name}, accelerated: {decibels:.1f} dB, below {LEAST_DB:g}"
        )
        context.expect(torch.equal(images(), theirs), f"{name}, restored: other images")


def _looped(
    diffusion: Diffusion, name: str, digits: Digits, count: int, options: dict[str, Any]
) -> Tensor:
    torch.manual_seed(3)
    result: Tensor = getattr(diffusion, name)(
        digits.model,
        digits.shape(count),
        model_kwargs=digits.condition(count),
        device=digits.device,
        **options,
    )
    return result


CHECK = Check(
    "optimized",
    "correctness",
    30.0,
    run,
    "The optimised digits network against the network itself in fp32 and bf16, after "
    "load_state_dict and refresh(), with and without the time table, inside a sampler, and in the "
    "loops of an accelerated diffusion.",
)
