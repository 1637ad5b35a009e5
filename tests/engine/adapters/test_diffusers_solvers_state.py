"""What stands between two steps of a solver: its memory, its copies, and x changed by others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.adapters.schedulers_case import ODD, seeded
from tests.engine.adapters.solvers_case import (
    MEMORIES,
    NAMES,
    NEAR,
    NOISY,
    asked,
    difference,
    draws,
    exact,
    network,
    pair,
    rows_of,
    run,
    start,
)
from torch import Tensor

from stepfuse.engine.adapters import diffusers as ours_of

Change = Callable[[int, Tensor], Tensor]


def check(name: str, steps: int = 9, near: float = NEAR, **options: Any) -> None:
    config = options.pop("config", {})
    options.setdefault("generator", draws(name))
    loops = [run(scheduler, steps, **options) for scheduler in pair(name, **config)]
    assert difference(loops[1].x, loops[0].x) < near


def replaced(i: int, x: Tensor) -> Tensor:
    return x * 0.9 + 0.05 if i in (2, 5) else x


def written(i: int, x: Tensor) -> Tensor:
    return x.mul_(0.9).add_(0.05) if i in (2, 5) else x


def with_a_gradient(i: int, x: Tensor) -> Tensor:
    return x.detach().requires_grad_(i == 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edit", [replaced, written, with_a_gradient])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_x_is_changed_between_steps(name: str, edit: Change, order: int) -> None:
    """By masks, callbacks and guidance."""
    if name in MEMORIES:
        check(name, edit=edit, config={"solver_order": order})
    elif order == 1:
        check(name, edit=edit)


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_in_some_of_the_steps(name: str) -> None:
    results = []
    for scheduler in pair(name):
        scheduler.set_timesteps(7)
        x = start(scheduler)
        kwargs = {"generator": seeded(2)} if draws(name) else {}
        for i, t in enumerate(scheduler.timesteps):
            with torch.inference_mode(i % 3 != 1):
                output = asked(scheduler, x, t)
                x = scheduler.step(output, t, x, **kwargs).prev_sample
        results.append(x.clone())
    assert difference(results[1], results[0]) < NEAR


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_memory_is_read_and_exchanged_on_the_way(name: str, order: int) -> None:
    theirs, ours = pair(name, solver_order=order)
    seen: list[list[Tensor]] = []
    for scheduler in (theirs, ours):
        kept: list[Tensor] = []

        def look(i: int, x: Tensor, scheduler: Any = scheduler, kept: Any = kept) -> Tensor:
            if i in (1, 4):
                kept += [m.clone() for m in scheduler.model_outputs if m is not None]
                if name == "UniPCMultistepScheduler":
                    kept.append(scheduler.last_sample)
            if i == 5:
                scheduler.model_outputs = [m * 0.5 for m in scheduler.model_outputs]
            return x

        kept.append(run(scheduler, 9, edit=look, generator=draws(name)).x)
        seen.append(kept)
    assert len(seen[0]) == len(seen[1])
    for found, expected in zip(seen[1], seen[0], strict=True):
        assert difference(found, expected) < NEAR


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_predictions_of_steps_that_never_were(name: str, order: int) -> None:
    """As diffusers' own tests set them."""
    past = [torch.full(ODD, 0.2), torch.full(ODD, 0.15), torch.full(ODD, 0.1)]
    results = []
    for scheduler in pair(name, solver_order=order):
        scheduler.set_timesteps(8)
        scheduler.model_outputs = past[:order]
        x = torch.randn(ODD, generator=seeded(1))
        for t in scheduler.timesteps[4:]:
            x = scheduler.step(network(x), t, x).prev_sample
        results.append(x)
    assert difference(results[1], results[0]) < NEAR


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_from_where_they_are(name: str, copied: Callable[[Any], Any]) -> None:
    _, ours = pair(name)
    ours.set_timesteps(8)
    generator = {"generator": seeded(2)} if draws(name) else {}
    x = start(ours)
    other = None
    for i, t in enumerate(ours.timesteps):
        if i == 4:
            other, y = copied(ours), x.clone()
            again = {"generator": seeded(2)} if draws(name) else {}
            for _ in range(4 if name in NOISY else 0):
                torch.randn(ODD, generator=again["generator"])
        x = ours.step(asked(ours, x, t), t, x, **generator).prev_sample
        if other is not None:
            y = other.step(asked(other, y, t), t, y, **again).prev_sample
            assert difference(y, x) < NEAR


@pytest.mark.parametrize("name", NAMES)
def test_one_of_diffusers_is_taken_over_on_its_way(name: str) -> None:
    results = []
    for exchange in (False, True):
        scheduler = pair(name)[0]
        scheduler.set_timesteps(8)
        x = start(scheduler)
        kwargs = {"generator": seeded(2)} if draws(name) else {}
        for i, t in enumerate(scheduler.timesteps):
            if i == 3 and exchange:
                scheduler = getattr(ours_of, name).taken_over(scheduler, True)
            x = scheduler.step(asked(scheduler, x, t), t, x, **kwargs)[0]
        results.append(x)
    assert difference(results[1], results[0]) < NEAR


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth(name: str, dtype: torch.dtype) -> None:
    options = {"generator": draws(name)}
    theirs, ours = (run(s, 12, dtype=dtype, **options) for s in pair(name))
    best = exact(pair(name)[0], 12, **options)
    rounding = torch.finfo(dtype).eps
    assert ours.x.dtype is theirs.x.dtype is dtype
    assert [m.dtype for m in ours.beside] == [m.dtype for m in theirs.beside]
    if draws(name):
        assert torch.equal(ours.state, theirs.state)
    if name not in NOISY:  # whose noise is drawn in half precision, another
        lost = difference(theirs.x.double(), best.x)
        assert difference(ours.x.double(), best.x) < 1.2 * lost + rounding
    assert difference(ours.x, theirs.x) < 12 * rounding  # each of 12 steps rounds x


SHAPES = [(1, 3, 8, 8), (2, 5), (3, 4, 7), (2, 3, 2, 5, 3), (1, 1, 1, 1)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    check(name, shape=shape)


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str) -> None:
    def channels_last(i: int, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if i % 2 else x

    def strided(i: int, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    check(name, edit=channels_last, shape=(2, 4, 6, 5))
    check(name, edit=strided, shape=(2, 4, 6, 5))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_given_is_not_written_to(name: str) -> None:
    _, ours = pair(name)
    ours.set_timesteps(5)
    x = torch.randn(ODD, generator=seeded(1))
    for t in ours.timesteps:
        output = asked(ours, x, t)
        before = x.clone(), output.clone()
        result = ours.step(output, t, x)[0]
        assert torch.equal(x, before[0])
        assert torch.equal(output, before[1])
        x = result


@pytest.mark.parametrize("name", NAMES)
def test_another_loop_begins_anew(name: str) -> None:
    """Also after one that was broken off, with other rows after another configuration."""
    _, ours = pair(name)
    options = {"generator": draws(name)}
    first = run(ours, 9, **options).x
    ours.set_timesteps(9)
    x = start(ours).flip(-1)
    for t in ours.timesteps[:4]:
        x = ours.step(asked(ours, x, t), t, x)[0]
    assert torch.equal(run(ours, 9, **options).x, first)
    if name != "FlowMatchEulerDiscreteScheduler":
        ours.register_to_config(prediction_type="v_prediction")
        expected = run(pair(name, prediction_type="v_prediction")[1], 9, **options).x
        assert torch.equal(run(ours, 9, **options).x, expected)
    assert rows_of(ours) == 1
