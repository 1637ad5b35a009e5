"""The sampler's promises: noise that follows the sample, steps, starts, masks, clear errors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor

from stepfuse import CFG, Sampler, Schedule
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels import philox
from stepfuse.kernels.step_row import Column

LINEAR = Schedule.linear()
SHAPE = (5, 3, 3, 5)  # 45 elements a sample: no multiple of a vector or of a Philox block
METHODS: list[dict[str, Any]] = [
    {"eta": 0.0},
    {"eta": 0.7},
    {"method": "ddim_hat"},
    {"method": "ddpm"},
    {"method": "ddpm", "variance_type": "learned_range"},
]


def build(**settings: Any) -> Sampler:
    model = Bumpy(settings.get("variance_type", "fixed_small"))
    return Sampler(model, LINEAR, **{"steps": 6, "graph": None, **settings})


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- noise


@pytest.mark.parametrize(("backend", "graph"), [("reference", None), ("auto", "auto")])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_sample_does_not_depend_on_its_batch(
    method: dict[str, Any], backend: str, graph: str | None
) -> None:
    sampler = build(**method, steps=3, backend=backend, graph=graph)
    whole = sampler.sample(SHAPE, seed=9, first_index=100)
    for batch_size in (2, 99):
        cut = sampler.sample(SHAPE, seed=9, first_index=100, batch_size=batch_size)
        assert torch.equal(cut, whole)
    head = sampler.sample((2, *SHAPE[1:]), seed=9, first_index=100)
    tail = sampler.sample((3, *SHAPE[1:]), seed=9, first_index=102)
    assert torch.equal(torch.cat([head, tail]), whole)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(sampler.sample(SHAPE, seed=9, first_index=100 + order), whole[order])
    assert not torch.equal(whole[0], whole[1])


@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    count=st.integers(1, 6),
    batch=st.integers(1, 7),
)
@settings(max_examples=8, deadline=None)
def test_a_sample_is_known_by_seed_and_number(
    seed: int, first: int, count: int, batch: int
) -> None:
    sampler = build(steps=2, eta=1.0)
    whole = sampler.sample((count, 1, 7), seed=seed, first_index=first, batch_size=batch)
    last = sampler.sample((1, 1, 7), seed=seed, first_index=first + count - 1)
    assert torch.equal(whole[-1:], last)


def test_every_sample_may_have_its_own_seed() -> None:
    sampler = build(eta=1.0)
    seeds = torch.tensor([7, 7, 8, -1, 0])
    mixed = sampler.sample(SHAPE, seed=seeds, batch_size=2)
    for n, seed in enumerate(seeds.tolist()):
        alone = sampler.sample((1, *SHAPE[1:]), seed=seed, first_index=n)
        assert torch.equal(mixed[n : n + 1], alone)


def test_the_noise_of_a_timestep_does_not_depend_on_the_number_of_steps() -> None:
    """Two samplers that share timestep 500 add the same noise there."""
    drawn = []
    for timesteps in ([500, 20], [999, 700, 500, 20]):
        sampler = build(timesteps=timesteps, eta=1.0, clip_sample=None)
        quiet = build(timesteps=timesteps, eta=1.0, clip_sample=None)
        rows = len(timesteps)
        x = torch.zeros(2, 1, 8)
        noisy = sampler.sample(x.shape, seed=4, x_T=x, start=500)
        still = quiet.sample(x.shape, x_T=x, start=500, noise=torch.zeros(rows, *x.shape))
        assert not torch.equal(noisy, still)
        drawn.append(noisy)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("graph", [None, "auto"])
def test_without_eta_the_seed_ends_with_x_T(graph: str | None) -> None:
    sampler = build(graph=graph)
    x = normal(1)
    one = sampler.sample(SHAPE, seed=1, x_T=x)
    two = sampler.sample(SHAPE, seed=2, first_index=77, x_T=x, batch_size=3)
    assert torch.equal(one, two)
    assert torch.equal(one, sampler.sample(SHAPE, x_T=x, noise=torch.full((6, *SHAPE), 1e9)))
    assert not torch.equal(sampler.sample(SHAPE, seed=1), sampler.sample(SHAPE, seed=2))


@pytest.mark.parametrize("method", METHODS[1:], ids=str)
def test_given_noise_is_the_same_as_drawn(method: dict[str, Any]) -> None:
    sampler = build(**method, backend="reference", dtype=torch.float64)
    index = torch.arange(SHAPE[0])
    drawn = [
        philox.normal(3, index, step, SHAPE[1:], backend="reference", dtype=torch.float64)
        for step in (philox.INITIAL, *sampler.timesteps)
    ]
    ours = sampler.sample(SHAPE, seed=3, x_T=drawn[0])
    given_noise = sampler.sample(SHAPE, x_T=drawn[0], noise=torch.stack(drawn[1:]), batch_size=2)
    assert torch.equal(ours, given_noise)
    # x_T itself is drawn in float32 where a fast backend can
    from_seed = sampler.sample(SHAPE, seed=3)
    torch.testing.assert_close(from_seed, ours, rtol=0, atol=1e-4)


# --- the loop


@pytest.mark.parametrize("graph", [None, "auto"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_iterate_is_sample_step_by_step(method: dict[str, Any], graph: str | None) -> None:
    sampler = build(**method, graph=graph)
    steps = []
    for step in sampler.iterate(SHAPE, seed=3):
        steps.append((step.index, step.t, step.x.clone(), step.x0.clone()))
        step.x.fill_(math.nan)  # a copy: the loop must not see it
        step.x0.fill_(math.nan)
    assert [s[:2] for s in steps] == list(enumerate(sampler.timesteps))
    final = sampler.sample(SHAPE, seed=3)
    assert torch.equal(steps[-1][2], final)
    assert torch.equal(steps[-1][3], final)  # the last step goes to the predicted x0
    assert all(bool((s[3].abs() <= 1).all()) for s in steps)
    seen: list[Tensor] = []
    sampler.sample(SHAPE, seed=3, callback=lambda step: seen.append(step.x))
    assert all(torch.equal(a, b[2]) for a, b in zip(seen, steps, strict=True))


def test_results_are_the_callers_own() -> None:
    sampler = build(eta=1.0, graph="auto")
    first = sampler.sample(SHAPE, seed=1)
    kept = first.clone()
    sampler.sample(SHAPE, seed=2)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(sampler.sample(SHAPE, seed=1), kept)


def test_arguments_are_left_alone() -> None:
    sampler = build(eta=1.0)
    x, z = normal(1), normal(2, (6, *SHAPE))
    image, mask = normal(3).clamp(-1, 1), (normal(4) > 0).float()
    before = [t.clone() for t in (x, z, image, mask)]
    sampler.sample(SHAPE, x_T=x, noise=z, image=image, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip((x, z, image, mask), before, strict=True))


@pytest.mark.parametrize("graph", [None, "auto"])
def test_a_failing_model_leaves_the_sampler_usable(graph: str | None) -> None:
    broken = False

    def model(x: Tensor, t: Tensor) -> Tensor:
        if broken:
            raise OSError("the model gave up")
        return Bumpy()(x, t)

    sampler = Sampler(model, LINEAR, steps=4, graph=None if graph is None else "auto")
    whole = sampler.sample(SHAPE, seed=1)
    broken = True
    if graph is None:
        with pytest.raises(OSError, match="gave up"):
            sampler.sample(SHAPE, seed=1)
    broken = False
    assert torch.equal(sampler.sample(SHAPE, seed=1), whole)
    steps = sampler.iterate(SHAPE, seed=1)
    next(steps)
    steps.close()
    assert torch.equal(sampler.sample(SHAPE, seed=1), whole)


def test_an_iterator_walks_the_timesteps_it_was_made_for() -> None:
    sampler = build(eta=1.0)
    expected = [step.x for step in sampler.iterate(SHAPE, noise=torch.ones(6, *SHAPE))]
    steps = sampler.iterate(SHAPE, noise=torch.ones(6, *SHAPE))
    sampler.set_timesteps(3)
    assert all(torch.equal(s.x, x) for s, x in zip(steps, expected, strict=True))


def test_an_unfinished_iterator_is_an_error_and_not_a_hang() -> None:
    sampler = build()
    steps = sampler.iterate(SHAPE)
    next(steps)
    with pytest.raises(RuntimeError, match="unfinished iterate"):
        sampler.sample(SHAPE)
    with pytest.raises(RuntimeError, match="a callback of this thread"):
        build().sample(SHAPE, callback=lambda _: sampler.reset())
    assert len(list(steps)) == 5
    sampler.sample(SHAPE)


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (None, 6),
        (CFG(1.0, unconditional={"shift": None}), 6),
        (CFG(2.0, unconditional={"shift": None}), 12),
        (CFG(2.0, unconditional={"shift": None}, interval=(300, 600)), 8),
    ],
)
def test_evaluations_are_counted_as_they_happen(guidance: CFG | None, expected: int) -> None:
    calls = []

    def model(x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == (len(x),)
        assert len(set(t.tolist())) == 1
        calls.append(int(t[0]))
        return Bumpy()(x, t)

    sampler = Sampler(model, LINEAR, steps=6, graph=None, guidance=guidance)
    sampler.sample(SHAPE, condition={"shift": torch.zeros(5)})
    assert sampler.num_function_evaluations == expected == len(calls)
    assert sorted(set(calls), reverse=True) == sampler.timesteps


@pytest.mark.parametrize(
    "wrap",
    [lambda out: SimpleNamespace(sample=out), lambda out: (out, "more"), lambda out: out.double()],
    ids=["object", "tuple", "float64"],
)
def test_what_a_model_may_return(wrap: Any) -> None:
    wrapped = Sampler(lambda x, t: wrap(Bumpy()(x, t)), LINEAR, steps=4, graph=None)
    torch.testing.assert_close(wrapped.sample(SHAPE), build(steps=4).sample(SHAPE))


def test_settings_reach_the_table() -> None:
    given_settings: dict[str, Any] = {
        "method": "ddpm",
        "prediction_type": "v_prediction",
        "variance_type": "fixed_large",
        "variance_at_zero": "clamp",
        "clip_sample": 0.5,
        "rederive_epsilon": False,
        "final_alpha_one": False,
    }
    assert build(**given_settings).update == Update(**given_settings)
    assert build(steps="ddim10").timesteps == list(range(900, -1, -100))
    assert build(steps=3, spacing="trailing").timesteps == [999, 666, 332]
    assert build(steps=2, steps_offset=1).timesteps == [501, 1]
    assert build(timesteps=(7, 3)).timesteps == [7, 3]


# --- starting points


@pytest.mark.parametrize("graph", [None, "auto"])
@pytest.mark.parametrize("method", METHODS[1::2], ids=str)
def test_a_walk_can_be_resumed(method: dict[str, Any], graph: str | None) -> None:
    sampler = build(**method, graph=graph)
    steps = list(sampler.iterate(SHAPE, seed=5))
    for k in (0, 3):
        here = sampler.timesteps[k + 1]
        ours = sampler.sample(SHAPE, seed=5, x_T=steps[k].x, start=here)
        assert torch.equal(ours, steps[-1].x)
        between = sampler.sample(SHAPE, seed=5, x_T=steps[k].x, start=here + 1)
        assert torch.equal(between, ours)  # the first timestep at or below


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 6), (0.5, 3), (0.34, 2), (0.01, 1)])
def test_strength_starts_from_a_noised_image(strength: float, steps: int) -> None:
    sampler = build(eta=1.0)
    image = normal(1).clamp(-1, 1)
    walked = list(sampler.iterate(SHAPE, seed=2, image=image, strength=strength))
    assert [step.t for step in walked] == sampler.timesteps[-steps:]
    assert [step.index for step in walked] == list(range(6 - steps, 6))
    start = walked[0].t
    abar = LINEAR.alphas_cumprod[start]
    eps = philox.normal(2, torch.arange(5), philox.INITIAL, SHAPE[1:])
    noised = float(abar.sqrt()) * image + float((1 - abar).sqrt()) * eps
    expected = sampler.sample(SHAPE, seed=2, x_T=noised, start=start)
    torch.testing.assert_close(walked[-1].x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("graph", [None, "auto"])
@pytest.mark.parametrize("method", METHODS[::2], ids=str)
def test_inpainting_keeps_the_known_region(method: dict[str, Any], graph: str | None) -> None:
    sampler = build(**method, graph=graph)
    image = normal(1).clamp(-0.9, 0.9)
    mask = torch.zeros(1, 1, 3, 5)
    mask[..., 2:] = 1
    steps = list(sampler.iterate(SHAPE, seed=2, image=image, mask=mask))
    kept, made = (mask == 0).expand(SHAPE), (mask == 1).expand(SHAPE)
    assert torch.equal(steps[-1].x[kept], image[kept])
    assert not torch.isclose(steps[-1].x[made], image[made]).any()
    assert torch.equal(steps[-1].x, sampler.sample(SHAPE, seed=2, image=image, mask=mask.bool()))
    cut = sampler.sample(SHAPE, seed=2, image=image, mask=mask, batch_size=2)
    assert torch.equal(steps[-1].x, cut)
    # on the way it is the image with the noise of x_T, at the level the step has reached
    eps = philox.normal(2, torch.arange(5), philox.INITIAL, SHAPE[1:])
    for step, row in zip(steps, sampler.plan.table, strict=True):
        known = row[Column.SIGNAL_NEXT] * image + row[Column.NOISE_NEXT] * eps
        torch.testing.assert_close(step.x[kept], known.float()[kept], rtol=0, atol=1e-6)


def test_masks_at_the_ends() -> None:
    sampler = build(eta=1.0)
    image = normal(1).clamp(-1, 1)
    everything = sampler.sample(SHAPE, seed=2, image=image, mask=torch.ones(SHAPE))
    assert torch.equal(everything, sampler.sample(SHAPE, seed=2))
    nothing = sampler.sample(SHAPE, seed=2, image=image, mask=torch.zeros(3, 5))
    assert torch.equal(nothing, image)


def test_encoding_ignores_how_the_sampler_samples() -> None:
    image = normal(1).clamp(-1, 1)
    plain = build(clip_sample=None)
    for settings_ in ({"eta": 1.0}, {"method": "ddpm"}, {"method": "ddim_hat"}):
        other = build(**settings_)
        latent = other.encode(image)
        assert torch.equal(latent, plain.encode(image))
        assert torch.equal(other.decode(latent), plain.sample(SHAPE, x_T=latent))
    # with one timestep an image taken to be there is there already
    assert torch.equal(build(timesteps=[999]).encode(image), image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    low = build(dtype=dtype, eta=0.5).sample(SHAPE, seed=1)
    assert low.dtype == dtype
    full = build(eta=0.5).sample(SHAPE, seed=1)
    # six steps, each rounded to 8 bits (bfloat16) and amplified by the model's slope
    near = {torch.float16: 0.1, torch.bfloat16: 0.5, torch.float64: 1e-4}[dtype]
    torch.testing.assert_close(low.float(), full, rtol=0, atol=near)
