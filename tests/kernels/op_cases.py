"""What the tests of the ops share: backends, memory with poison around it, tolerances."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from stepfuse.bench.gpu_check.against import ROUNDING, SMALLEST_HALF
from stepfuse.kernels import backends, products

Mode = Literal["reference", "cpp", "interpreter", "sm_80", "sm_90"]
COMPILED: tuple[Mode, ...] = ("reference", "cpp")
# a program of a thousand elements takes the interpreter a tenth of a second, so cases are small
INTERPRETER: tuple[Mode, ...] = ("interpreter",)
MODES: tuple[Mode, ...] = COMPILED + INTERPRETER
SIMULATED: tuple[Mode, ...] = ("sm_80", "sm_90")  # a compilation a case, so only a few of them

# Box-Muller in float32 against the definition in float64 (DESIGN: normals agree to 1e-6).
NORMAL = 1e-6

needs_module = pytest.mark.skipif(
    bool(backends.why_not("cpp")), reason="needs the C++ module (a C++ compiler)"
)
needs_bfloat16 = pytest.mark.skipif(
    bool(products.why_not(torch.bfloat16)), reason="needs AVX512-BF16 (CPU)"
)
PRODUCT_DTYPES = (torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16))

Layout = Literal["contiguous", "channels_last", "transposed"]


@contextlib.contextmanager
def entered(mode: Mode) -> Iterator[str]:
    """Inside, the backend named by the result takes CPU tensors; skips where it is not there."""
    with contextlib.ExitStack() as stack:
        if mode == "interpreter":
            stack.enter_context(_truncation())
        name = mode if mode in ("reference", "cpp") else "triton"
        if name == "triton":
            from triton_modes import interpreted, simulated

            stack.enter_context(
                interpreted() if mode == "interpreter" else simulated(int(mode.removeprefix("sm_")))
            )
        reason = backends.why_not(name, "cpu")
        if reason:
            pytest.skip(reason)
        yield name


def across(names: str, *parts: tuple[Sequence[Mode], Iterable[Any]]) -> pytest.MarkDecorator:
    """Parametrise ``backend`` and ``names``; each part runs its cases in each of its modes."""
    several = "," in names
    parameters = []
    for modes, cases in parts:
        for case, mode in itertools.product(dict.fromkeys(cases), modes):
            values = case if several else (case,)
            label = "-".join(_label(value) for value in (mode, *values))
            parameters.append(pytest.param(mode, *values, id=label))
    return pytest.mark.parametrize(f"backend,{names}", parameters, indirect=["backend"])


def everywhere(modes: Sequence[Mode] = MODES) -> pytest.MarkDecorator:
    """Parametrise ``backend`` alone."""
    return pytest.mark.parametrize("backend", modes, indirect=True)


def _label(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    return str(value).removeprefix("torch.")


def random_like(shape: Sequence[int], dtype: torch.dtype, layout: Layout = "contiguous") -> Tensor:
    """Standard normals in that memory layout."""
    return placed(torch.randn(*shape, dtype=torch.float64).to(dtype), layout)


def placed(x: Tensor, layout: Layout) -> Tensor:
    """A copy of x, dense in C order, with the channels innermost, or with dimensions swapped."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x.contiguous()


class Poisoned:
    """A result buffer laid out like ``like``, full of NaN, with NaN before and behind it.

    ``offset`` elements precede the buffer, so that an odd one puts it at an address that takes no
    wide access.
    """

    def __init__(self, like: Tensor, offset: int = 64) -> None:
        size = like.numel()
        self._memory = torch.full((offset + size + 64,), torch.nan, dtype=like.dtype)
        self._edges = self._memory[:offset], self._memory[offset + size :]
        self.tensor = self._memory[offset : offset + size].as_strided(
            like.shape, like.stride(), offset
        )

    def check(self) -> Tensor:
        """The result, once every element was written and nothing around it was."""
        assert not self.tensor.isnan().any(), "some elements were not written"
        assert all(edge.isnan().all() for edge in self._edges), "memory around was written"
        return self.tensor


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative L2, in float64."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-3))


@contextlib.contextmanager
def in_threads(threads: int) -> Iterator[None]:
    """Inside, torch and our module use that many."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def negated(x: Tensor) -> Tensor:
    """The values of x, as a view whose memory holds -x, in the order of x."""
    return torch._neg_view(-x)


@contextlib.contextmanager
def _truncation() -> Iterator[None]:
    """Inside, bfloat16 may be off by a whole unit: Triton's interpreter cuts the low bits off."""
    half = ROUNDING[torch.bfloat16]
    ROUNDING[torch.bfloat16] = 2 * half
    try:
        yield
    finally:
        ROUNDING[torch.bfloat16] = half


def assert_within(actual: Tensor, exact: Tensor, absolute: Tensor | float, what: str = "") -> None:
    """``actual`` is within ``absolute`` of ``exact``, beyond the rounding of its own dtype."""
    actual, exact = actual.detach(), exact.detach().double()
    rounding = ROUNDING[actual.dtype] * exact.abs() if actual.dtype in ROUNDING else 0.0
    if actual.dtype == torch.float16:
        rounding = rounding + SMALLEST_HALF
    excess = (actual.double() - exact).abs() - rounding - absolute
    worst = float(excess.max())
    assert worst <= 0, f"{what} off by {worst:.3g} more than {torch.as_tensor(absolute).max():.3g}"
