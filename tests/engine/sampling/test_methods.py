"""Solvers as files and as objects of a user's own."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.sampling.analytic import Bumpy
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.sampling import methods
from stepfuse.engine.sampling.plan import step_table
from stepfuse.engine.sampling.steps import Steps
from stepfuse.engine.sampling.update import Update
from stepfuse.kernels.step_row import Column

SCHEDULE = sf.Schedule.linear()
SHAPE = (2, 3, 4, 5)


def halfway(schedule: sf.Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    """DDIM with half of its noise taken out of the direction only."""
    steps = Steps.down(schedule, timesteps, update)
    steps.implicit(steps.posterior_variance / 2, torch.zeros_like(steps.a))
    return steps.table


def ddim(schedule: sf.Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
    steps = Steps.down(schedule, timesteps, update)
    steps.implicit(torch.zeros_like(steps.a), torch.zeros_like(steps.a))
    return steps.table


def test_the_files_are_the_names() -> None:
    folder = Path(methods.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(methods.names()) == files
    assert {"ddim", "ddim_hat", "ddpm", "ddgan", "dpmpp", "unipc", "euler"} < files
    for name in methods.names():
        method = methods.named(name)
        assert method.name == name
        assert method.rows.__module__ == f"stepfuse.engine.sampling.methods.{name}"


def test_a_new_file_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the file: the sampler, its errors and the command line know the name."""
    (tmp_path / "halfway.py").write_text(
        "from tests.engine.sampling.test_methods import halfway\n"
        "from stepfuse.engine.sampling.methods import Method\n"
        "METHOD = Method(halfway)\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    sampler = sf.Sampler(Bumpy(), SCHEDULE, method="halfway", steps=5)
    own = sf.Sampler(Bumpy(), SCHEDULE, method=sf.Method(halfway), steps=5)
    assert "halfway" in methods.names()
    assert "halfway, epsilon" in sampler.explain()
    assert torch.equal(sampler.sample(SHAPE, seed=1), own.sample(SHAPE, seed=1))
    with pytest.raises(ValueError, match="heun, lcm, plms, tcd, unipc; got 'rk4'"):
        sf.Sampler(Bumpy(), SCHEDULE, method="rk4")


def test_a_method_of_ones_own_runs_captured() -> None:
    own = sf.Sampler(Bumpy(), SCHEDULE, method=sf.Method(ddim), steps=7)
    theirs = sf.Sampler(Bumpy(), SCHEDULE, steps=7)
    assert torch.equal(own.plan.table, theirs.plan.table)
    assert torch.equal(own.sample(SHAPE, seed=3), theirs.sample(SHAPE, seed=3))
    assert own.stats()["replays"] == 7
    assert "ddim, epsilon" in own.explain()


@pytest.mark.parametrize("again", [copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_keep_the_method(again: Any) -> None:
    sampler = sf.Sampler(Bumpy(), SCHEDULE, method=sf.Method(halfway), steps=3)
    assert torch.equal(again(sampler).sample(SHAPE, seed=2), sampler.sample(SHAPE, seed=2))


def test_eta_is_for_methods_that_take_it() -> None:
    with pytest.raises(ValueError, match=r"'halfway' takes no eta: it must be 0; got eta=0\.5"):
        sf.Sampler(Bumpy(), SCHEDULE, method=sf.Method(halfway), eta=0.5)
    taking = sf.Method(halfway, takes=("eta",))
    assert sf.Sampler(Bumpy(), SCHEDULE, method=taking, eta=0.5).update.eta == 0.5


def test_the_prediction_types_of_a_method() -> None:
    only = sf.Method(halfway, predictions=("sample", "v_prediction"))
    with pytest.raises(ValueError, match="'sample' or 'v_prediction'; got 'epsilon'"):
        sf.Sampler(Bumpy(), SCHEDULE, method=only)


def test_a_learned_variance_needs_a_method_that_takes_it() -> None:
    update = Update(method=sf.Method(halfway), variance_type="learned")
    assert not update.uses_learned_variance
    assert Update(method="ddpm", variance_type="learned").uses_learned_variance


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sf.Method(3), TypeError, r"rows must be callable as rows\(schedule, .*got int 3"),
        (lambda: sf.Method(dict), TypeError, "rows must be callable"),
        (lambda: sf.Method(ddim, takes="eta"), ValueError, "takes must be a tuple of eta, var"),
        (lambda: sf.Method(ddim, takes=("order",)), ValueError, "got 'order'"),
        (lambda: sf.Method(ddim, takes=3), ValueError, "takes must be a tuple .*got int 3"),
        (lambda: sf.Method(ddim, predictions=("x0",)), ValueError, "epsilon, sample, v_pred"),
        (lambda: sf.Method(ddim, predictions=()), ValueError, "predictions must name"),
        (lambda: sf.Method(ddim, shifts_mean=1), TypeError, "shifts_mean must be True or False"),
        (lambda: sf.Method(ddim, name=3), TypeError, "name must be a str; got int 3"),
    ],
)
def test_what_is_no_method(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "table",
    [
        None,
        torch.zeros(3, 16),
        torch.zeros(3, 15, dtype=torch.float64),
        torch.zeros(0, 16, dtype=torch.float64),
        [[0.0] * 16],
    ],
    ids=["none", "float32", "narrow", "empty", "list"],
)
def test_rows_that_are_no_table(table: Any) -> None:
    method = sf.Method(lambda *_: table, name="mine")
    with pytest.raises(
        ValueError, match=r"rows of method 'mine' must be float64 \[S, 16\] on the CPU; got"
    ):
        sf.Sampler(Bumpy(), SCHEDULE, method=method)


def test_rows_that_overflow_name_their_timestep() -> None:
    def rows(schedule: sf.Schedule, timesteps: Sequence[int], update: Update) -> Tensor:
        table = ddim(schedule, timesteps, update)
        table[1, Column.C_O] = float("nan")
        return table

    with pytest.raises(ValueError, match="step at timestep 666 is not finite"):
        step_table(SCHEDULE, [999, 666, 333], Update(method=sf.Method(rows)))
