"""Compiling is nobody else's business: not that of other threads, of stderr, of random numbers."""

from __future__ import annotations

import threading
import warnings
from queue import SimpleQueue

import pytest
import torch
from tests.engine.compile.odd_modules import Branching, conv
from torch import Tensor, nn

from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.tracing.quiet import quietly


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 6, 8), torch.tensor([5, 7])


class Constant(nn.Module):
    """Makes a tensor on the way, for which torch.export is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)


class Shaped(nn.Module):
    """Fails for some values, which only a run finds out."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if t.max() > 3:
            return torch.cat([x, x[:, :, 1:]], 1)
        return x


def test_the_filters_of_warnings_stay_where_threads_compile_in_turn() -> None:
    """One enters while another is inside, and leaves after it."""
    before = list(warnings.filters)
    first, second = quietly(), quietly()
    with first:
        second.__enter__()
    second.__exit__(None, None, None)
    assert warnings.filters == before


def test_the_filters_of_warnings_stay_where_somebody_else_changes_them() -> None:
    """``catch_warnings`` of another thread starts inside and ends outside."""
    before = list(warnings.filters)
    outer, others = quietly(), warnings.catch_warnings()
    with outer:
        others.__enter__()
    warnings.simplefilter("error")
    others.__exit__(None, None, None)
    assert warnings.filters == before


@pytest.mark.filterwarnings("error")
def test_warnings_are_silent_in_one_thread_alone() -> None:
    raised: list[Warning] = []

    def warn() -> None:
        try:
            warnings.warn("from elsewhere", UserWarning, stacklevel=1)
        except UserWarning as warning:
            raised.append(warning)

    with quietly():
        warn()
        assert not raised
        thread = threading.Thread(target=warn)
        thread.start()
        thread.join()
    assert len(raised) == 1
    warn()
    assert len(raised) == 2


def test_many_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    before = list(warnings.filters)
    models = [Constant().eval() for _ in range(4)]
    threads = [threading.Thread(target=optimize, args=(m, inputs())) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


_ASKED: SimpleQueue[tuple[bool, bool]] = SimpleQueue()  # no state of a model's


def ask() -> None:
    _ASKED.put((torch.compiler.is_exporting(), torch.compiler.is_compiling()))


class Asking(Constant):
    """Asks, itself and in another thread, whether it is being exported."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return super().forward(x, t)


@torch.no_grad()
def test_other_threads_are_not_exporting() -> None:
    """An optimizer asks, and would annotate a graph that is not its own."""
    asked = torch.compiler.is_exporting
    optimize(Asking().eval(), inputs())
    answers = [_ASKED.get_nowait() for _ in range(_ASKED.qsize())]
    assert (True, True) in answers[::2], "torch.export was not used: this tests nothing"
    assert set(answers[1::2]) == {(False, False)}
    assert torch.compiler.is_exporting is asked


@torch.no_grad()
def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    optimize(Branching().eval(), inputs())
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        optimize(Shaped().eval(), inputs())
    assert capfd.readouterr() == ("", "")
