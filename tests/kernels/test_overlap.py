"""Where outputs may lie: what shares memory is refused, by every op and every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import MODES, everywhere
from torch import Tensor

from stepfuse.kernels import philox
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.group_norm_silu import group_norm_silu
from stepfuse.kernels.overlap import overlaps_itself, shares_memory

SHAPE = (2, 4, 3, 5)
SIZE = 120
ABAR = torch.linspace(1, 0.1, 10, dtype=torch.float64)
ROW = torch.linspace(0.1, 1.6, 16).expand(2, 16).contiguous()  # clips at 0.7, adds noise
ROUNDING = 1e-6  # float32 against float32, in another order

Memory = tuple[Tensor, Callable[[int], Tensor]]


def memory(size: int = 4 * SIZE) -> Memory:
    """Numbers, and tensors of SHAPE that start at one of them."""
    buffer = torch.linspace(-2, 2, size)
    return buffer, lambda start: buffer[start : start + SIZE].view(SHAPE)


def noised(x: Tensor, **more: Any) -> Any:
    return add_noise(x, more.pop("noise", torch.ones_like(x)), 3, ABAR, **more)


def stepped(x: Tensor, **more: Any) -> Any:
    return denoise_step(x, more.pop("model_output", torch.ones_like(x)), ROW, 1, **more)


def normed(x: Tensor, **more: Any) -> Any:
    return group_norm_silu(x, None, None, 2, **more)


OPS = [noised, stepped, normed]
WITH_TWO = [
    (noised, "target_out", {"target": "v_prediction"}),
    (stepped, "x0_out", {}),
]


@everywhere(MODES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("by", [1, -1, 4, SIZE - 1])
def test_an_output_that_begins_inside_an_input(op: Any, by: int, backend: str) -> None:
    buffer, at = memory()
    before = buffer.clone()
    with pytest.raises(ValueError, match=r"out must not overlap x0? in memory, unless it is that"):
        op(at(SIZE + by), out=at(SIZE), backend=backend)
    assert torch.equal(buffer, before)


@everywhere(MODES)
@pytest.mark.parametrize(("op", "second", "more"), WITH_TWO)
def test_outputs_that_overlap_each_other(op: Any, second: str, more: Any, backend: str) -> None:
    _, at = memory()
    x = at(0)
    for start in (SIZE, SIZE + 7):
        places = {"out": at(SIZE), second: at(start)}
        with pytest.raises(ValueError, match=f"{second} must not overlap out in memory"):
            op(x, **more, **places, backend=backend)
    with pytest.raises(ValueError, match=f"{second} must not overlap (out|x0?) in memory"):
        op(x, **more, inplace=True, **{second: x}, backend=backend)
    with pytest.raises(ValueError, match=f"{second} must not overlap x0? in memory"):
        op(x, **more, **{second: at(3)}, backend=backend)


@everywhere(MODES)
@pytest.mark.parametrize("op", OPS)
def test_an_output_that_overlaps_itself(op: Any, backend: str) -> None:
    x = torch.randn(SHAPE)
    for out in (
        torch.zeros(4, 3, 5).expand(SHAPE),
        torch.zeros(99).as_strided(SHAPE, (30, 9, 3, 1)),
    ):
        with pytest.raises(ValueError, match="memory of its own for every element; got shape"):
            op(x, out=out, backend=backend)


@pytest.mark.parametrize("op", OPS[:2])
def test_in_place_over_an_expanded_input(op: Any) -> None:
    with pytest.raises(ValueError, match="memory of its own for every element"):
        op(torch.randn(4, 3, 5).expand(SHAPE), inplace=True)


def test_an_output_in_the_order_of_another_view_of_x() -> None:
    x = torch.randn(2, 3, 4, 4)
    for op in (noised, stepped):
        with pytest.raises(ValueError, match=r"out must not overlap x0? in memory"):
            op(x, out=x.transpose(2, 3))


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "add"])
def test_an_output_over_a_parameter(name: str) -> None:
    buffer, at = memory()
    shape = (4,) if name in ("weight", "bias") else (2, 4)
    parameters: dict[str, Any] = {"weight": None, "bias": None}
    parameters[name] = buffer[SIZE + 3 :].as_strided(shape, (4, 1)[-len(shape) :])
    with pytest.raises(ValueError, match="out must not overlap an input in memory"):
        group_norm_silu(at(0), groups=2, **parameters, out=at(SIZE))


def test_an_output_over_a_table_or_a_model_output() -> None:
    buffer, at = memory()
    table = buffer[SIZE - 8 : SIZE + 24].view(2, 16)
    with pytest.raises(ValueError, match="out must not overlap an input in memory"):
        denoise_step(at(200), at(320), table, 0, out=at(0))
    for name in ("model_output", "uncond_output", "noise"):
        more = {"model_output": torch.zeros(SHAPE), name: at(5)}
        with pytest.raises(ValueError, match=f"out must not overlap {name} in memory"):
            stepped(at(200), **more, out=at(0))
    both = buffer[: 2 * SIZE].view(4, 4, 3, 5)  # for guidance, the unconditional half first
    with pytest.raises(ValueError, match="out must not overlap model_output in memory"):
        stepped(at(300), model_output=both, out=at(0))


@everywhere(MODES)
@pytest.mark.parametrize("op", OPS)
def test_what_shares_nothing_is_written(op: Any, backend: str) -> None:
    """Neighbours in one memory, exact aliases, and slices of channels next to each other."""
    buffer, at = memory()
    expected = op(at(0).clone(), backend=backend)
    for out in (at(SIZE), at(0)):
        buffer.copy_(torch.linspace(-2, 2, len(buffer)))
        assert op(at(0), out=out, backend=backend) is out
        torch.testing.assert_close(out, expected, rtol=ROUNDING, atol=ROUNDING)
    wide = torch.zeros(2, 8, 3, 5)
    wide[:, ::2] = torch.linspace(-2, 2, len(buffer))[:SIZE].view(SHAPE)
    op(wide[:, ::2], out=wide[:, 1::2], backend=backend)
    torch.testing.assert_close(wide[:, 1::2], expected, rtol=ROUNDING, atol=ROUNDING)


@everywhere(MODES)
@pytest.mark.parametrize("name", ["model_output", "noise"])
def test_an_exact_alias_of_another_elementwise_input(name: str, backend: str) -> None:
    x, other = torch.randn(2, *SHAPE)
    expected = stepped(x, **{name: other.clone()}, backend=backend)
    stepped(x, **{name: other}, out=other, backend=backend)
    torch.testing.assert_close(other, expected, rtol=ROUNDING, atol=ROUNDING)


@everywhere(MODES)
def test_noise_that_is_written_over_is_the_target_first(backend: str) -> None:
    x, noise = torch.randn(2, *SHAPE)
    before = noise.clone()
    expected = noised(x, noise=before)
    _, target = noised(x, noise=noise, target="epsilon", out=noise, backend=backend)
    torch.testing.assert_close(noise, expected, rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(target, before)


def test_memory_that_two_storages_share() -> None:
    array = np.zeros(2 * SIZE, dtype=np.float32)
    x, out = (torch.from_numpy(array[s : s + SIZE]).view(SHAPE) for s in (0, 8))
    assert x.untyped_storage()._cdata != out.untyped_storage()._cdata
    with pytest.raises(ValueError, match="out must not overlap x in memory"):
        normed(x, out=out)


def test_philox_into_memory_it_reads_or_that_overlaps_itself() -> None:
    words = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="memory of its own"):
        philox.normal(1, words[:2], 3, (4,), out=torch.zeros(4).expand(2, 4))
    with pytest.raises(ValueError, match="out must not overlap an input in memory"):
        philox.normal(1, words[:2], 3, (4,), out=words.view(torch.float32)[:8].view(2, 4))


def test_watched_calls_refuse_the_same() -> None:
    """Through the dispatcher, where a mode sees the operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    _, at = memory()
    for op in OPS:
        with Watching(), pytest.raises(ValueError, match="must not overlap"):
            op(at(0), out=at(3))


BUFFER = torch.zeros(4096, dtype=torch.uint8)


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A tensor in BUFFER of any strides, 0 and overlapping ones too."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int64]))
    rank = draw(st.integers(0, 4))
    shape = draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank))
    stride = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 48])
    strides = draw(st.lists(stride, min_size=rank, max_size=rank))
    return BUFFER.view(dtype).as_strided(shape, strides, draw(st.integers(0, 100)))


def elements(x: Tensor) -> list[int]:
    """The first byte of every element."""
    places = np.zeros(x.shape, dtype=np.int64)
    for k, (stride, size) in enumerate(zip(x.stride(), x.shape, strict=True)):
        places += (np.arange(size) * stride).reshape([-1 if i == k else 1 for i in range(x.dim())])
    return ((places.ravel() + x.storage_offset()) * x.element_size()).tolist()


@given(a=strided(), b=strided())
@settings(max_examples=400, deadline=None)
def test_the_tests_are_exact(a: Tensor, b: Tensor) -> None:
    assert overlaps_itself(a) == (len(set(elements(a))) < a.numel())
    of_a, of_b = (
        {first + i for first in elements(x) for i in range(x.element_size())} for x in (a, b)
    )
    assert shares_memory(a, b) == bool(of_a & of_b)
    assert shares_memory(b, a) == bool(of_a & of_b)


def test_large_tensors_take_few_steps() -> None:
    """Slices of channels of a large batch: disjoint, though their ranges meet."""
    wide = torch.empty(64, 8, 128, 128, device="cpu")
    assert not shares_memory(wide[:, :3], wide[:, 3:])
    assert not shares_memory(wide[:, ::2], wide[:, 1::2])
    assert shares_memory(wide[:, :4], wide[:, 3:])
    assert not overlaps_itself(wide.permute(3, 1, 0, 2)[::2, 1:])
