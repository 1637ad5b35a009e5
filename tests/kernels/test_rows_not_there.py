"""Indices that nobody has looked at, because they are on a GPU: NaN where there is no such row.

What a call refuses on the CPU is handed to the launchers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_modes import interpreted, needs_compiler

from stepfuse.kernels import add_noise as forward_process
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.reference import add_noise as add_noise_reference
from stepfuse.kernels.reference import denoise_step as denoise_step_reference
from stepfuse.kernels.step_row import COLUMNS, Column

ABAR = torch.linspace(0.99, 0.01, 10, dtype=torch.float64)
# far ones would be a fault of memory, near ones somebody else's numbers
NOWHERE = [-(2**40), -1, 10, 2**40]
SHAPES = [(2, 3, 4, 4), (2, 3, 5, 7)]  # rows of whole blocks, and blocks that cross samples


@pytest.fixture(params=["reference", "interpreter"])
def launchers(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[..., None], ...]]:
    """``run`` of add_noise and of denoise_step, in the backends that a GPU has."""
    if request.param == "reference":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(denoise_step_reference, "check_range", lambda *_: None)
            yield add_noise_reference.run, denoise_step_reference.run
        return
    with interpreted():
        from stepfuse.kernels.triton import add_noise as noised
        from stepfuse.kernels.triton import denoise_step as denoised

        yield noised.run, denoised.run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("t", NOWHERE)
def test_a_timestep_that_the_schedule_has_not(
    launchers: tuple[Callable[..., None], ...], t: int, drawn: bool, shape: tuple[int, ...]
) -> None:
    """Its own sample is NaN, and the one beside it is what it was."""
    x0, timesteps = torch.randn(shape), torch.tensor([t, 4])
    noise = None if drawn else torch.randn(shape)
    seeds = torch.tensor([3, 4]) if drawn else None
    x_t, v = torch.zeros(shape), torch.zeros(shape)
    launchers[0](x0, noise, timesteps, ABAR, seeds, seeds, x_t, v, True)
    assert x_t[0].isnan().all()
    assert v[0].isnan().all()
    numbers: dict[str, Any] = {} if seeds is None else {"seed": seeds, "sample": seeds}
    settings = {"target": "v_prediction", "backend": "reference", **numbers}
    beside = add_noise(x0, noise, torch.tensor([4, 4]), ABAR, **settings)
    for found, expected in zip((x_t, v), beside, strict=True):
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


def table() -> Tensor:
    """Four rows with numbers in every column, and noise."""
    rows = torch.rand(4, COLUMNS) + 0.5
    rows[:, Column.TIMESTEP] = torch.arange(4)
    return rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drawn", [False, True], ids=["no noise", "drawn"])
@pytest.mark.parametrize("step", [-(2**40), -1, 4, 2**40])
def test_a_row_that_the_table_has_not(
    launchers: tuple[Callable[..., None], ...], step: int, drawn: bool, shape: tuple[int, ...]
) -> None:
    x, output, rows = torch.randn(shape), torch.randn(shape), table()
    rows[:, Column.C_0] = 0  # NaN in x0 has to reach x_s all the same
    seeds = torch.tensor([3, 4]) if drawn else None
    x_s, x0 = torch.zeros(shape), torch.zeros(shape)
    counter = torch.tensor([step])
    launchers[1](x, output, None, rows, counter, None, seeds, seeds, False, x_s, x0)
    assert x_s.isnan().all()
    assert x0.isnan().all()


@pytest.mark.parametrize("step", [-1, 4])
def test_such_a_row_writes_no_history(
    launchers: tuple[Callable[..., None], ...], step: int
) -> None:
    x, output, rows = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), table()
    x_s, history, memory = torch.zeros_like(x), torch.ones(2, *x.shape), torch.ones(4, 8)
    counter = torch.tensor([step])
    launchers[1](
        x, output, None, rows, counter, None, None, None, False, x_s, None, history, memory
    )
    assert x_s.isnan().all()
    assert (history == 1).all()


@pytest.mark.parametrize("step", [0, 3])
def test_the_first_and_the_last_row_are_there(
    launchers: tuple[Callable[..., None], ...], step: int
) -> None:
    x, output, rows = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), table()
    x_s, x0 = torch.zeros_like(x), torch.zeros_like(x)
    counter = torch.tensor([step])
    launchers[1](x, output, None, rows, counter, None, None, None, False, x_s, x0)
    expected = denoise_step_reference.update(x, output, None, rows[step], None, False)
    torch.testing.assert_close((x_s, x0), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_nan_where_the_result_is() -> None:
    """`add_noise` saves t as it is: its backward looks the schedule up again."""

    class Saved:
        saved_tensors = (torch.tensor([10, 4]), ABAR)
        x0_dtype = noise_dtype = torch.float32
        target = None
        needs_input_grad = (True, True)

    d_x0, d_noise, *_ = forward_process._backward(Saved(), torch.ones(2, 3), None)
    assert d_x0[0].isnan().all()
    assert d_noise[0].isnan().all()
    torch.testing.assert_close(d_x0[1], ABAR[4].sqrt().float().expand(3))
    torch.testing.assert_close(d_noise[1], (1 - ABAR[4]).sqrt().float().expand(3))


@needs_compiler
def test_the_compiled_load_of_the_schedule_is_guarded() -> None:
    pytest.importorskip("triton")
    from stepfuse.kernels.triton import add_noise as noised
    from stepfuse.kernels.triton.ahead import compiling

    x = torch.empty(4, 3, 32, 32, device="meta")
    t = torch.empty(4, dtype=torch.int64, device="meta")
    with compiling(90) as log:
        for length in (1, 1000, 1024):
            abar = torch.empty(length, dtype=torch.float64, device="meta")
            noised.run(x, x, t, abar, None, None, x, None, False)
    assert len({item.ptx for item in log}) == 1, "a schedule of another length is the same kernel"
    wide = [line.split() for line in log[0].ptx.splitlines() if "ld.global.b64" in line]
    assert len(wide) == 2, "t, and the schedule at t"
    assert [line[0].startswith("@%p") for line in wide] == [False, True]
