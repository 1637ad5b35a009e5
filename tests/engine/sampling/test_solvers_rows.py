"""The solvers as methods: what their rows have in common, and where two of them are one."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from tests.engine.sampling.rows_case import distance, log_snr_points, run
from torch import Tensor

from stepfuse import Schedule, spaced_timesteps
from stepfuse.engine.sampling.exponentials import tail
from stepfuse.engine.sampling.grids import grid_timesteps, named_sigmas
from stepfuse.engine.sampling.methods import named, names
from stepfuse.engine.sampling.methods.euler import euler
from stepfuse.engine.sampling.methods.plms import plms
from stepfuse.engine.sampling.methods.unipc import unipc
from stepfuse.engine.sampling.multistep import dpmpp
from stepfuse.engine.sampling.plan import step_table
from stepfuse.engine.sampling.points import Points, roots_at
from stepfuse.engine.sampling.terms import COUNTERS, Terms, slots_of, split, table
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.step_row import COLUMNS, HISTORY_COLUMNS, Column, HistoryColumn

LINEAR = Schedule.linear()
TEN = spaced_timesteps(1000, 10, steps_offset=1)
SOLVERS = ("dpmpp", "dpmpp_sde", "unipc", "euler", "euler_a", "heun", "plms", "lcm", "tcd")
ROUNDING = 1e-14
SAME = [c for c in range(COLUMNS) if c not in (Column.VARIANCE, Column.L_0, Column.L_1)]


def rows(method: str, timesteps: list[Any] = TEN, schedule: Schedule = LINEAR, **s: Any) -> Tensor:
    update = Update(method=method, **s)
    return update.solver.rows(schedule, timesteps, update)


def test_they_are_there() -> None:
    assert set(SOLVERS) < set(names())


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("method", "settings", "ddim"),
    [
        ("euler", {}, {}),
        ("dpmpp", {"order": 1}, {}),
        ("unipc", {"order": 1}, {}),
        ("tcd", {}, {}),
        ("euler_a", {}, {"eta": 1.0}),
        ("dpmpp_sde", {"order": 1}, {"eta": 1.0}),
        ("euler_a", {}, {"method": "ddpm"}),
    ],
)
def test_first_order_is_ddim(
    method: str, settings: Any, ddim: Any, prediction: str, clip: float | None
) -> None:
    """The same x in the end; the rows are other sums where nothing is clipped."""
    common = {"prediction_type": prediction, "clip_sample": clip}
    ours = rows(method, **settings, **common)
    theirs = step_table(LINEAR, TEN, Update(**ddim, **common))
    noise = list(torch.randn(10, 2, 3, 4, dtype=torch.float64))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    if method == "unipc":  # it corrects, which is no DDIM
        points = Points.down(LINEAR, TEN, Update())
        terms = unipc(points, 1, disable_corrector=range(10))
        ours = table(points, terms, prediction, clip)
    memory = torch.zeros(10, HISTORY_COLUMNS, dtype=torch.float64)
    memory[:, HistoryColumn.WRITE] = -1
    memory[:, HistoryColumn.TIME] = torch.tensor(TEN)
    expected = run(torch.cat([theirs, memory], dim=1), Bumpy(), x, noise)
    assert distance(run(ours, Bumpy(), x, noise), expected) < 1e-11
    assert slots_of(split(ours)[1]) == 0


def test_euler_in_another_scale_is_ddim_row_for_row() -> None:
    points = Points.down(LINEAR, TEN, Update())
    ours = table(points, euler(points), "sample", None)[:, :COLUMNS]
    theirs = step_table(LINEAR, TEN, Update(prediction_type="sample", clip_sample=1e9))
    keep = [c for c in SAME if c != Column.CLIP]
    torch.testing.assert_close(ours[:, keep], theirs[:, keep], rtol=0, atol=ROUNDING)
    large = Points(points.timesteps, torch.ones(11), points.noise / points.signal)
    scaled = table(large, euler(large), "sample", None)[:, :COLUMNS]
    ratio = points.signal[:-1] / points.signal[1:]
    torch.testing.assert_close(scaled[:, Column.C_X], ours[:, Column.C_X] * ratio)


def test_unip_of_second_order_is_nearly_two_steps_of_dpmpp() -> None:
    """Their weights of the difference are B / 2 and phi_1 / 2, which are one for bh2."""
    points = log_snr_points(12)
    ours = table(points, unipc(points, 2, "bh2", disable_corrector=range(12)), "sample", None)
    theirs = table(points, dpmpp(points, 2, "midpoint"), "sample", None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 60])
@pytest.mark.parametrize("method", SOLVERS)
def test_rows_are_finite_and_know_where_they_stand(
    method: str, count: int, final: bool, prediction: str
) -> None:
    solver = named(method)
    if prediction not in solver.predictions:
        with pytest.raises(ValueError, match="needs prediction_type"):
            rows(method, prediction_type=prediction)
        return
    times = spaced_timesteps(1000, count, "trailing")
    for order in solver.orders or (None,):
        for kind in solver.solver_types or (None,):
            found = rows(
                method,
                times,
                prediction_type=prediction,
                order=order,
                solver_type=kind,
                final_alpha_one=final,
            )
            assert found.dtype == torch.float64
            assert found.shape[1] == COLUMNS + HISTORY_COLUMNS
            found[:, Column.CLIP] = 0
            assert bool(found.isfinite().all())
            assert len(set(found[:, Column.TIMESTEP].tolist())) == len(found)
            ends = found[-1, [Column.SIGNAL_NEXT, Column.NOISE_NEXT]].tolist()
            if final:
                assert ends == [1, 0]
                assert found[-1, Column.SIGMA] == 0
            asked = found[:, COLUMNS + HistoryColumn.TIME].tolist()
            extra = {"heun": count - 1, "plms": int(count > 1)}.get(method, 0)
            assert len(asked) == count + extra
            assert list(dict.fromkeys(asked)) == times
            if len(set(asked)) == len(asked):
                assert found[:, Column.TIMESTEP].tolist() == asked


def test_weights_are_benign() -> None:
    """None of a magnitude that would lose a memory of lower precision, whatever the grid."""
    for method in ("dpmpp", "dpmpp_sde", "unipc"):
        for order in (2, 3):
            for grid in ("karras", "logsnr", "beta"):
                times = grid_timesteps(LINEAR, grid, 8)
                found = rows(method, times, order=order)
                weights = found[:, [Column.C_X, Column.C_0, *range(COLUMNS, COLUMNS + 3)]]
                assert float(weights.abs().max()) < 5


def test_what_is_remembered_goes_round_in_a_ring() -> None:
    _, memory = split(rows("dpmpp", spaced_timesteps(1000, 20), order=3))
    assert slots_of(memory) == 2
    # the last step is of order 1 and the one before would look back twice
    assert memory[:, HistoryColumn.WRITE].tolist()[:18] == [0, 1] * 9
    assert memory[-1].tolist()[:7] == [0, 0, 0, 0, 0, 0, -1]
    _, memory = split(rows("dpmpp", order=3))  # below 15 steps the last but one is of order 2
    assert memory[:, HistoryColumn.WRITE].tolist() == [0, 1] * 4 + [-1, -1]


def test_noise_is_counted_by_timestep_or_by_row() -> None:
    whole = rows("dpmpp_sde")
    assert whole[:, Column.TIMESTEP].tolist() == TEN
    between = rows("dpmpp_sde", [900.5, 400.0, 3.25])
    assert between[:, Column.TIMESTEP].tolist() == [COUNTERS, COUNTERS + 1, COUNTERS + 2]
    assert between[:, COLUMNS + HistoryColumn.TIME].tolist() == [900.5, 400.0, 3.25]
    twice = rows("heun", [900, 400])
    assert twice[:, Column.TIMESTEP].tolist() == [COUNTERS, COUNTERS + 1, COUNTERS + 2]
    assert twice[:, COLUMNS + HistoryColumn.TIME].tolist() == [900, 400, 400]


def test_a_row_that_looks_back_too_far() -> None:
    points = log_snr_points(5)
    terms = [Terms(i, i + 1, remember=(0, 0, 1)) for i in range(5)]
    terms[4].look_back(4, 1.0)
    with pytest.raises(ValueError, match="look back 3 times; got 4"):
        table(points, terms, "sample", None)


@pytest.mark.parametrize(
    ("signal", "noise", "message"),
    [
        ([0.5, 1.0], [0.5], r"\[S\], \[S \+ 1\] and \[S \+ 1\]; got \[\(1,\), \(2,\), \(1,\)\]"),
        ([0.9, 0.5], [0.1, 0.5], "fall from point to point"),
        ([0.5, math.nan], [0.5, 0.1], "fall from point to point"),
        ([0.5, 0.0], [0.5, 0.5], "fall from point to point"),
        ([0.5, 1.0], [0.0, 0.0], "must be positive"),
    ],
)
def test_points_that_are_none(signal: list[float], noise: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Points(torch.ones(1), torch.tensor(signal), torch.tensor(noise))


def test_pure_noise_at_the_start() -> None:
    schedule = LINEAR.zero_terminal_snr()
    times = spaced_timesteps(1000, 6, "trailing")
    for method in ("dpmpp", "dpmpp_sde", "unipc", "euler", "euler_a", "heun"):
        found = rows(method, times, schedule, prediction_type="v_prediction")
        found[:, Column.CLIP] = 0
        assert bool(found.isfinite().all())
        end, _ = roots_at(schedule, torch.tensor([times[1]], dtype=torch.float64))
        assert found[0, Column.C_0] == pytest.approx(float(end))
    with pytest.raises(
        ValueError, match="its first point must hold some signal; abar is 0 at timestep 999"
    ):
        plms(Points.down(schedule, times, Update()), "v_prediction")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "dpmpp", "order": 4},
            "order of method 'dpmpp' must be one of 1, 2, 3; got int 4",
        ),
        ({"method": "unipc", "solver_type": "midpoint"}, "must be one of 'bh1', 'bh2'; got"),
        (
            {"method": "heun", "order": 2},
            "method 'heun' takes no order: it must be None; got int 2",
        ),
        ({"method": "ddim", "solver_type": "heun"}, "'ddim' takes no solver_type"),
        ({"method": "unipc", "strict": False}, "'unipc' has no other form: strict must be True"),
        ({"method": "dpmpp", "eta": 0.5}, "'dpmpp' takes no eta"),
        ({"method": "dpmpp", "prediction_type": "mean"}, "needs prediction_type 'epsilon' or"),
        ({"method": "ddim", "prediction_type": "flow_prediction"}, "needs prediction_type"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Update(**settings)


def test_what_is_left_of_an_exponential() -> None:
    for order in (1, 2, 3, 4):
        for x in (-30.0, -2.0, -0.5001, -0.4999, -1e-3, -1e-9, 0.3):
            # the first term carries it near 0
            exact = math.fsum(x**n / math.factorial(n) for n in range(order, 150))
            assert tail(x, order) == pytest.approx(exact, rel=1e-12 if abs(x) < 3 else 1e-3)


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("grid", ["karras", "exponential", "beta"])
def test_grids_are_those_of_diffusers(grid: str, steps: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**{f"use_{grid}_sigmas": True})
    scheduler.set_timesteps(steps)
    schedule = Schedule.linear()
    found = torch.tensor(named_sigmas(schedule, grid, steps))
    # theirs are of a float32 table
    torch.testing.assert_close(found, scheduler.sigmas[:-1].float(), rtol=1e-4, atol=0)
    times = torch.tensor(grid_timesteps(schedule, grid, steps), dtype=torch.float32)
    torch.testing.assert_close(times, scheduler.timesteps.float(), rtol=0, atol=0.01)


@pytest.mark.parametrize("grid", ["karras", "exponential", "beta", "logsnr"])
def test_a_timestep_of_a_grid_has_its_sigma_again(grid: str) -> None:
    sigmas = torch.tensor(named_sigmas(LINEAR, grid, 17), dtype=torch.float64)
    times = grid_timesteps(LINEAR, grid, 17)
    signal, noise = roots_at(LINEAR, torch.tensor(times, dtype=torch.float64))
    torch.testing.assert_close(noise / signal, sigmas, rtol=1e-12, atol=0)
    assert times[0] == 999
    assert times[-1] == 0


def test_sigmas_of_ones_own() -> None:
    times = grid_timesteps(LINEAR, [100.0, 3.0, 0.1], 50)
    signal, noise = roots_at(LINEAR, torch.tensor(times, dtype=torch.float64))
    torch.testing.assert_close((noise / signal).tolist(), [100.0, 3.0, 0.1])
    assert (
        grid_timesteps(LINEAR, torch.tensor([100.0, 3.0, 0.1, 0.0], dtype=torch.float64), 50)
        == times
    )


@pytest.mark.parametrize(
    ("grid", "steps", "message"),
    [
        ("karras", 1, "grid 'karras' has two ends: steps must be at least 2; got 1"),
        ("Karras", 5, "grid must be one of karras, exponential, logsnr, beta, or a list of sigmas"),
        ([], 5, "must fall, and be one at least"),
        ([1.0, 1.0], 5, "must fall, and be one at least"),
        ([1.0, 2.0], 5, "must fall, and be one at least"),
        ([400.0, 2.0], 5, r"must be in 0\.0100005 \.\. 157\.\d+, those of the schedule; got 400"),
        ([4.0, 0.001], 5, "those of the schedule; got 4 .. 0.001"),
        ([4.0, math.nan], 5, "grid must be"),
    ],
)
def test_grids_that_are_none(grid: Any, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid_timesteps(LINEAR, grid, steps)


def test_a_grid_needs_finite_noise() -> None:
    with pytest.raises(ValueError, match="zero terminal SNR"):
        grid_timesteps(LINEAR.zero_terminal_snr(), "karras", 5)
