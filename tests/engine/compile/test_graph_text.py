"""One stage's graph in words: every call, its result and who wrote it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.compile.networks import small
from torch import Tensor, nn

import stepfuse as sf


def stage(fast: sf.Optimized, graph: Any) -> list[str]:
    """The lines of the only network, without the inputs that it is for."""
    inputs, *lines = fast.explain(graph=graph).split("\n")
    assert inputs == "inputs                 [3, 3, 7, 9] float32, [3] int64"
    return lines


def test_every_line_names_result_kind_maker_and_operator() -> None:
    model, given = small()
    fast = sf.optimize(model, given, weights="kept")
    head, *lines, last = stage(fast, "main")
    assert head.startswith("main(")
    assert last.startswith("  return ")
    makers = {pass_.__name__ for pass_ in sf.PASSES}
    for line in lines:
        name, kind, maker, call = (part.strip() for part in line.split("   ") if part.strip())
        assert name.isidentifier()
        assert kind.startswith("[3, ")
        assert "float32" in kind
        assert maker in makers, "in this network nothing of the model's own is left"
        assert call.endswith(")")
    text = "\n".join(lines)
    assert text.count("mkldnn._convolution_pointwise") == 8
    assert text.count("[3, 3, 7, 9] float32 channels_last") == 2
    assert "stepfuse.group_norm_silu(" in text
    assert "a.norm1.weight, a.norm1.bias, 2, 1e-05" in text
    assert stage(fast, True) == stage(fast, "main")


def test_stages_have_their_calls() -> None:
    model, given = small()
    fast = sf.optimize(model, given, torch.bfloat16)
    time, weights = stage(fast, "time"), stage(fast, "weights")
    assert sum("aten.linear(" in line for line in time) == 4
    assert sum("the model" in line for line in time) == 17
    packed = [line for line in weights if "mkldnn._reorder_convolution_weight(" in line]
    assert len(packed) == 8
    assert all("prepack_convolutions" in line for line in packed)
    # what one stage returns is what the next is given
    handed = time[-1].removeprefix("  return ")
    assert stage(fast, "main")[0].removesuffix(")").endswith(handed)


def test_where_there_is_no_stage() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    _, given = small()
    fast = sf.optimize(Branch(), given)
    (line,) = stage(fast, True)
    assert line.startswith("no graph: ")
    fast = sf.optimize(nn.Conv2d(3, 3, 1), given[:1])
    assert fast.explain(graph="time").endswith("time()\n  return")


def test_a_network_for_numbers_and_several_shapes() -> None:
    class Any_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()[0]

        def forward(self, x: Tensor, t: Any) -> Tensor:
            out: Tensor = self.inner(x, torch.as_tensor(t).reshape(-1).expand(len(x)))
            return out

    _, (x, t) = small()
    fast = sf.optimize(Any_().eval(), (x, 5))
    fast.compile(x[:1], t[:1])
    both = fast.explain(graph="main").split("\n\n")
    assert [part.split("\n")[1].startswith("main(") for part in both] == [True, True]
    assert "[1, 3, 7, 9]" not in both[0]
    assert "[3, 3, 7, 9]" not in both[1]


@pytest.mark.parametrize(
    ("graph", "error", "got"),
    [("mian", ValueError, "'mian'"), (None, TypeError, "None"), (1, TypeError, "int 1")],
)
def test_other_words_are_refused(graph: Any, error: type[Exception], got: str) -> None:
    model, given = small()
    fast = sf.optimize(model, given)
    accepted = f"graph must be True, False or one of 'weights', 'time', 'main'; got .*{got}"
    with pytest.raises(error, match=accepted):
        fast.explain(graph=graph)
