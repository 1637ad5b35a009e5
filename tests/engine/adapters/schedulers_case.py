"""One loop of a scheduler on random model outputs, and the comparison of two such loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from stepfuse.engine.adapters.diffusers.ddim import DDIMScheduler
from stepfuse.engine.adapters.diffusers.ddim_inverse import DDIMInverseScheduler
from stepfuse.engine.adapters.diffusers.ddpm import DDPMScheduler

OURS = {
    "DDIMScheduler": DDIMScheduler,
    "DDPMScheduler": DDPMScheduler,
    "DDIMInverseScheduler": DDIMInverseScheduler,
}
ODD = (3, 2, 5, 7)
# float32: a folded coefficient differs from a product of rounded factors by some 1e-7, and a loop
# of up to 40 steps adds such differences up; x0 = (x - sqrt(1-a) o) / sqrt(a) makes them larger by
# 1 / sqrt(a), up to 160
TOLERANCE = 1e-5


class Loop(NamedTuple):
    """What a loop gives: the list, every x_s, every x0, and the generators afterwards."""

    timesteps: Tensor
    samples: list[Tensor]
    originals: list[Tensor]
    states: list[Tensor]


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """(theirs, ours) of one configuration."""
    return getattr(diffusers, name)(**config), OURS[name](**config)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(
    scheduler: Any,
    *,
    shape: Sequence[int] = ODD,
    channels: int | None = None,
    generators: int = 1,
    steps: Any = None,
    **kwargs: Any,
) -> Loop:
    """Step through ``scheduler.timesteps``, with outputs that do not depend on the sample.

    ``channels`` of the model output, where they are not those of the sample; ``generators`` 1 for
    one of the batch, more for a list, 0 for none.
    """
    x = torch.randn(tuple(shape), generator=seeded(1))
    wide = (shape[0], channels or shape[1], *shape[2:])
    drawn = [seeded(10 + i) for i in range(generators)]
    if drawn:
        kwargs["generator"] = drawn[0] if generators == 1 else drawn
    samples, originals = [], []
    timesteps = scheduler.timesteps if steps is None else steps
    for i, t in enumerate(timesteps):
        output = torch.randn(wide, generator=seeded(100 + i))
        if channels is not None:  # a variance in 0 .. 1 says something to every variance type
            output[:, shape[1] :].sigmoid_()
        result = scheduler.step(output, t, x, **kwargs)
        x = result.prev_sample
        samples.append(x)
        originals.append(result.pred_original_sample)
    states = [generator.get_state() for generator in drawn]
    return Loop(torch.as_tensor(timesteps), samples, originals, states)


def assert_same(ours: Loop, theirs: Loop, abar: Tensor) -> None:
    """Same list, same generators afterwards, samples equal to rounding; finite where theirs are."""
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for mine, other in zip(ours.states, theirs.states, strict=True):
        assert torch.equal(mine, other)
    previous = torch.ones(1)
    for i, t in enumerate(theirs.timesteps.tolist()):
        scale = size(previous, theirs.samples[i])
        close(ours.samples[i], theirs.samples[i], scale, f"x after t = {t}")
        gain = float(abar[t]) ** -0.5 if float(abar[t]) > 0 else 1.0
        close(ours.originals[i], theirs.originals[i], scale * gain, f"x0 at t = {t}")
        previous = theirs.samples[i]
        if not previous.isfinite().all():
            return  # both go on with what is no number


def size(*tensors: Tensor) -> float:
    """The largest finite magnitude, at least 1."""
    values = torch.cat([x.detach().double().flatten() for x in tensors])
    values = values[values.isfinite()].abs()
    return max(1.0, float(values.max())) if len(values) else 1.0


def close(ours: Tensor, theirs: Tensor, scale: float, what: str) -> None:
    """Equal to `TOLERANCE` of ``scale``; not finite at the same places, NaN or infinite there."""
    assert ours.dtype is theirs.dtype, what
    assert ours.shape == theirs.shape, what
    assert torch.equal(ours.isfinite(), theirs.isfinite()), f"{what}: finite elsewhere"
    ours, theirs = ours[ours.isfinite()], theirs[theirs.isfinite()]
    error = float((ours - theirs).abs().max()) if len(ours) else 0.0
    assert error <= TOLERANCE * scale, f"{what}: differs by {error} at a scale of {scale}"
