"""The solvers in `Sampler`: captured and eager, from any start, with all that surrounds a step."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import diffusers
import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from tests.engine.sampling.rows_case import distance, run
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.networks.unet import UNet, UNetConfig
from stepfuse.engine.sampling.lint import check_capturable
from stepfuse.engine.sampling.plan import step_table
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels import philox

SCHEDULE = sf.Schedule.linear()
SHAPE = (3, 2, 5, 3)
SETTINGS: list[dict[str, Any]] = [
    {"method": "dpmpp"},
    {"method": "dpmpp", "order": 3, "strict": False, "clip_sample": None},
    {"method": "dpmpp", "solver_type": "heun", "grid": "karras"},
    {"method": "dpmpp_sde", "order": 3},
    {"method": "dpmpp_sde", "grid": "logsnr", "prediction_type": "v_prediction"},
    {"method": "unipc"},
    {"method": "unipc", "order": 3, "solver_type": "bh1", "prediction_type": "sample"},
    {"method": "heun", "grid": "beta"},
    {"method": "plms"},
    {"method": "plms", "prediction_type": "v_prediction", "clip_sample": None},
    {"method": "euler", "grid": "exponential"},
    {"method": "euler_a", "grid": "karras"},
    {"method": "lcm", "spacing": "trailing"},
    {"method": "tcd", "eta": 0.3, "spacing": "trailing"},
    {"method": "unipc", "prediction_type": "flow_prediction", "spacing": "trailing"},
    {"method": "euler", "prediction_type": "flow_prediction", "grid": [1.0, 0.7, 0.2, 0.0]},
]


def sampler(settings: dict[str, Any], **more: Any) -> sf.Sampler:
    given = {"steps": 6, **settings, **more}
    return sf.Sampler(given.pop("model", Bumpy()), SCHEDULE, **given)


def drawn(dtype: torch.dtype = torch.float64) -> Tensor:
    return philox.normal(
        5, torch.arange(SHAPE[0]), philox.INITIAL, SHAPE[1:], "reference", dtype=dtype
    )


def rows_of(made: sf.Sampler) -> Tensor:
    return step_table(SCHEDULE, made._asked, made.update)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_loop_is_what_the_rows_say(settings: dict[str, Any]) -> None:
    made = sampler(settings, dtype=torch.float64)
    noise = torch.randn(len(made.timesteps), *SHAPE, dtype=torch.float64)
    expected = run(rows_of(made), Bumpy(), drawn(), list(noise))
    found = made.sample(SHAPE, x_T=drawn(), noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert made.stats()["replays"] == len(made.timesteps)
    assert made.num_function_evaluations == len(made.timesteps)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_captured_and_eager_are_equal(settings: dict[str, Any], backend: str) -> None:
    captured, eager = (sampler(settings, backend=backend, graph=g) for g in ("step", None))
    expected = eager.sample(SHAPE, seed=3)
    assert torch.equal(captured.sample(SHAPE, seed=3), expected)
    assert captured.stats()["captures"] == 1
    assert eager.stats()["captures"] == 0
    steps = list(captured.iterate(SHAPE, seed=3))
    assert torch.equal(steps[-1].x, expected)
    assert [step.t for step in steps] == captured.timesteps


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_float32_is_near_float64(settings: dict[str, Any]) -> None:
    made = sampler(settings)
    noise = torch.randn(len(made.timesteps), *SHAPE)
    expected = sampler(settings, dtype=torch.float64).sample(SHAPE, x_T=drawn(), noise=noise)
    found = made.sample(SHAPE, x_T=drawn().float(), noise=noise)
    assert distance(found.double(), expected) < 3e-4


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s["method"] != "lcm"], ids=str)
def test_bfloat16(settings: dict[str, Any]) -> None:
    """What is remembered is float32: a step is off by what x itself is rounded by.

    Heun's second row takes x, as it was rounded, times half of sigma / sigma_t - 1, so that no grid
    may leap there.
    """
    if settings["method"] == "heun":
        settings = {**settings, "grid": "karras", "steps": 20}

    def smooth(x: Tensor, t: Tensor) -> Tensor:
        phase = 0.01 * t.double().view(-1, 1, 1, 1)
        return (0.5 * torch.sin(0.5 * x.double() + phase)).to(x.dtype)

    common = {"model": smooth, "prediction_type": "sample"}
    made = sampler(settings, dtype=torch.bfloat16, **common)
    noise = torch.randn(len(made.timesteps), *SHAPE)
    exact = sampler(settings, dtype=torch.float64, **common)
    expected = exact.sample(SHAPE, x_T=drawn(), noise=noise)
    found = made.sample(SHAPE, x_T=drawn().bfloat16(), noise=noise)
    assert distance(found.double(), expected) < 0.05
    program = next(iter(made._programs._runners.values())).program
    assert program.history is None or program.history.dtype == torch.float32


@pytest.mark.parametrize(
    ("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")]
)
@pytest.mark.parametrize("name", ["dpmpp", "unipc"])
def test_it_is_the_scheduler_of_diffusers(name: str, order: int, kind: str) -> None:
    """With their timesteps and their table of float32, in float32."""
    config = {"solver_order": order, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
              "beta_end": 0.012, "prediction_type": "epsilon"}  # fmt: skip
    kinds = {"dpmpp": {"solver_type": kind}, "unipc": {"solver_type": "bh2"}}[name]
    scheduler = {
        "dpmpp": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[name](**config, **kinds)
    scheduler.set_timesteps(10)
    x = expected = drawn().float()
    for t in scheduler.timesteps:
        expected = scheduler.step(Bumpy()(expected, t.expand(3)), t, expected).prev_sample
    ours = sf.Sampler(
        Bumpy(),
        sf.Schedule.from_alphas_cumprod(scheduler.alphas_cumprod),
        method=name,
        order=order,
        clip_sample=None,
        timesteps=scheduler.timesteps,
        **kinds,
    )
    assert distance(ours.sample(SHAPE, x_T=x), expected) < 2e-5


SLOTS: dict[int, list[dict[str, Any]]] = {
    1: [{"method": "dpmpp"}, {"method": "heun"}, {"method": "dpmpp_sde", "solver_type": "heun"},
        {"method": "unipc", "order": 1}],
    2: [{"method": "unipc"}, {"method": "dpmpp", "order": 3}, {"method": "dpmpp_sde", "order": 3}],
    3: [{"method": "unipc", "order": 3}, {"method": "plms"}],
}  # fmt: skip


@pytest.mark.parametrize("slots", SLOTS)
def test_one_capture_serves_every_table_of_as_many_slots(slots: int) -> None:
    made = sampler(SLOTS[slots][0])
    for settings, steps in itertools.product(SLOTS[slots], (6, 9, 30)):
        made.set_timesteps(steps, **settings)
        assert made.plan.slots == slots
        fresh = sampler(settings, steps=steps)
        assert torch.equal(made.sample(SHAPE, seed=2), fresh.sample(SHAPE, seed=2))
    assert made.stats()["captures"] == 1
    made.set_timesteps(6, method="ddim")
    made.sample(SHAPE)
    assert made.stats()["captures"] == 2
    made.set_timesteps(8, **SLOTS[slots][-1])
    made.sample(SHAPE)
    assert made.stats()["captures"] == 2


@pytest.mark.parametrize("graph", ["step", None])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_an_earlier_run_left_is_not_read(settings: dict[str, Any], graph: Any) -> None:
    made = sampler(settings, graph=graph)
    expected = made.sample(SHAPE, seed=4)
    program = next(iter(made._programs._runners.values())).program
    if program.history is not None:
        program.history.fill_(float("nan"))
    assert torch.equal(made.sample(SHAPE, seed=4), expected)
    for step in made.iterate(SHAPE, seed=9):
        if step.index == 3:
            break
    assert torch.equal(made.sample(SHAPE, seed=4), expected)
    assert torch.equal(sampler(settings, graph=graph).sample(SHAPE, seed=4), expected)


@pytest.mark.parametrize("settings", SETTINGS[:15], ids=str)
def test_a_later_start_is_a_sampler_of_the_steps_that_are_left(settings: dict[str, Any]) -> None:
    """The first step remembers nothing, and the noise of a row is that of the whole way."""
    made = sampler(settings, dtype=torch.float64)
    image = drawn().clamp(-1, 1)
    rows = len(made.timesteps)
    noise = torch.randn(rows, *SHAPE, dtype=torch.float64)
    found = made.sample(SHAPE, seed=5, image=image, strength=0.5, noise=noise)
    left = made._asked[3:]
    rest = sampler({**settings, "grid": None, "order": None}, dtype=torch.float64)
    rest._plan(made.update, left, None)
    signal, sigma = made._level(left[0])
    x = signal * image + sigma * drawn()
    skipped = rows - len(rest.timesteps)
    assert torch.equal(rest.sample(SHAPE, x_T=x, noise=noise[skipped:]), found)
    indices = [s.index for s in made.iterate(SHAPE, image=image, strength=0.5, noise=noise)]
    assert indices == list(range(skipped, rows))
    if made.plan.slots:
        assert made.stats()["captures"] == 1


def test_a_start_by_timestep() -> None:
    made = sampler({"method": "heun"}, steps=10)
    x = drawn().float()
    assert made._asked == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    found = made.sample(SHAPE, x_T=x, start=450)
    other = sampler({"method": "heun"}, timesteps=[400, 300, 200, 100, 0])
    assert torch.equal(found, other.sample(SHAPE, x_T=x))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_masks(settings: dict[str, Any]) -> None:
    """What is known is in the end the image itself, and the rest is not."""
    made = sampler(settings)
    image, mask = torch.full(SHAPE, 0.25), torch.zeros(1, 1, 5, 3)
    mask[..., 2:, :] = 1
    found = made.sample(SHAPE, image=image, mask=mask)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[..., :2, :], image[..., :2, :], rtol=0, atol=1e-6)
    assert not torch.allclose(found[..., 2:, :], image[..., 2:, :], atol=1e-2)


def test_guidance() -> None:
    def shifted(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return torch.sin(x + shift[:, None, None, None]) + t[0] / 1000

    condition = {"shift": torch.tensor([0.3, -0.2, 0.7])}
    nothing = {"shift": torch.zeros(3)}

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = shifted(x, t, condition["shift"]), shifted(x, t, nothing["shift"])
        return uncond + 2.5 * (cond - uncond)

    for settings in SETTINGS[:8]:
        made = sampler(settings, model=shifted, guidance=sf.CFG(2.5, unconditional=nothing))
        plain = sampler(settings, model=mixed)
        found = made.sample(SHAPE, seed=1, condition=condition)
        torch.testing.assert_close(found, plain.sample(SHAPE, seed=1), rtol=2e-3, atol=2e-3)
        assert made.num_function_evaluations == 2 * len(made.timesteps)


def test_guidance_that_changes_keeps_the_history() -> None:
    def model(x: Tensor, t: Tensor, on: Tensor) -> Tensor:
        return torch.sin(x) * on[:, None, None, None]

    made = sampler({"method": "dpmpp"}, model=model)
    condition = {"on": torch.ones(3)}
    before = made.sample(SHAPE, condition=condition)
    made.guidance = sf.CFG(3.0, unconditional={"on": torch.zeros(3)})
    assert made.plan.slots == 1
    assert not torch.equal(made.sample(SHAPE, condition=condition), before)


@pytest.mark.parametrize(
    "settings", [s for s in SETTINGS if s["method"] in ("dpmpp_sde", "euler_a", "tcd", "unipc")],
    ids=str,
)  # fmt: skip
def test_a_sample_does_not_know_of_its_batch(settings: dict[str, Any]) -> None:
    whole = sampler(settings).sample((7, 3, 4, 5), seed=8)
    for size in (1, 3):
        assert torch.equal(sampler(settings).sample((7, 3, 4, 5), seed=8, batch_size=size), whole)
    assert torch.equal(sampler(settings).sample((2, 3, 4, 5), seed=8, first_index=4), whole[4:6])


def test_no_two_rows_share_their_noise() -> None:
    """Timesteps that lie between the same whole ones, with a model that says x0 = 0."""
    times = [500.75, 500.5, 500.25, 3.0]
    made = sampler(
        {"method": "euler_a", "timesteps": times, "prediction_type": "sample"},
        model=lambda x, t: 0 * x,
        clip_sample=None,
    )
    steps = list(made.iterate((1, 1, 64, 64), seed=1, x_T=torch.zeros(1, 1, 64, 64)))
    table, fresh = made.plan.table, []
    for number, step in enumerate(steps[:3]):
        before = steps[number - 1].x if number else torch.zeros_like(step.x)
        fresh.append((step.x - float(table[number, 2]) * before).flatten())
    together = torch.corrcoef(torch.stack(fresh))
    assert float((together - torch.eye(3)).abs().max()) < 5 / 64


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("again", [copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies(again: Any, settings: dict[str, Any]) -> None:
    made = sampler(settings)
    assert torch.equal(again(made).sample(SHAPE, seed=2), made.sample(SHAPE, seed=2))


def test_what_it_says_of_itself() -> None:
    said = sampler({"method": "dpmpp", "order": 3, "strict": False, "grid": "karras"}).explain()
    assert "method      dpmpp of order 3 (midpoint), not strict, epsilon" in said
    assert "history     2 tensors like x" in said
    assert "timesteps are not whole" in said
    assert "table       6 steps, timesteps 999 .. 0" in said
    assert "history" not in sampler({"method": "euler"}).explain()
    assert "not whole" not in sampler({"method": "unipc"}).explain()


def test_the_history_counts_as_memory() -> None:
    made, plain = sampler({"method": "unipc"}), sampler({"method": "ddim"})
    made.sample(SHAPE)
    plain.sample(SHAPE)
    more = made.stats()["bytes"] - plain.stats()["bytes"]
    assert more >= 2 * 4 * torch.Size(SHAPE).numel()


def test_an_optimised_network_takes_timesteps_between_the_whole_ones() -> None:
    network = UNet(UNetConfig.digits()).eval().requires_grad_(False)
    labels = {"labels": torch.tensor([1, 2])}
    for grid in ("karras", None):
        settings: dict[str, Any] = {"method": "dpmpp", "grid": grid, "steps": 3}
        fast = sf.Sampler(network, SCHEDULE, optimize=True, **settings)
        slow = sf.Sampler(network, SCHEDULE, **settings)
        found = fast.sample((2, 1, 16, 16), seed=1, condition=labels)
        expected = slow.sample((2, 1, 16, 16), seed=1, condition=labels)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert fast.stats()["captures"] == 1


@pytest.mark.parametrize("settings", SETTINGS[:10], ids=str)
def test_the_lint_passes(settings: dict[str, Any]) -> None:
    network = UNet(UNetConfig.digits())
    made = sampler(settings, model=network)
    check_capturable(made, (2, 1, 16, 16), {"labels": torch.tensor([1, 2])})


def test_inversion_is_ddim_whatever_the_solver() -> None:
    image = drawn().clamp(-1, 1)
    made = sampler({"method": "unipc"}, dtype=torch.float64)
    ddim = sampler({}, dtype=torch.float64)
    z = made.encode(image)
    assert torch.equal(z, ddim.encode(image))
    assert torch.equal(made.decode(z), ddim.decode(z))
    between = sampler({"method": "unipc", "grid": "karras"})
    with pytest.raises(ValueError, match="DDIM inversion needs timesteps that are whole"):
        between.encode(image)


def test_interpolation() -> None:
    a, b = torch.zeros(SHAPE), torch.ones(SHAPE) / 2
    for settings in ({"method": "heun"}, {"method": "dpmpp", "grid": "karras"}):
        made = sampler(settings)
        assert bool(sf.interpolate(made, a, b, 0.3, 700).isfinite().all())


def test_switching_between_solvers_forgets_another_variance() -> None:
    made = sf.Sampler(
        Bumpy("learned_range"), SCHEDULE, method="ddpm", variance_type="learned_range", steps=5
    )
    made.sample(SHAPE)
    made.set_timesteps(5, method="dpmpp")
    assert made.update.method == "dpmpp"
    assert bool(made.sample(SHAPE).isfinite().all())
    assert made.update == Update("dpmpp", variance_type="learned_range", prediction_type="epsilon")
