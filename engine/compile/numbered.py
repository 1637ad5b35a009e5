"""A timestep given as a Python number: one network serves them all, with the number as a tensor.

A graph would keep the number, and every other one would be compiled anew. Which kind of tensor the
model takes instead is found out by comparing results: one entry per sample, as the model contract
has it, or a tensor without dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepfuse.engine.compile.calls import have_values
from stepfuse.engine.compile.compiled import Compiled, compiled
from stepfuse.engine.compile.graph import PassReport
from stepfuse.engine.compile.network import Settings
from stepfuse.engine.compile.stages import Stage
from stepfuse.engine.compile.without_graph import WithoutGraph, without_graph
from stepfuse.engine.replay.workspace import Workspace
from stepfuse.kernels.torch_names import pytree

# relative L2 of sums in another order, in float32 and in 16 bits
_ROUNDING, _ROUNDING_LOWERED = 1e-5, 1e-2
# of what another timestep does: the float32 that stands for a number turns a fast sine this far
_SAME = 1e-3


class Numbered:
    """``network``, made for a tensor where the model was given a number; see `CompiledNetwork`."""

    def __init__(self, network: Compiled, per_sample: bool) -> None:
        self.network, self._per_sample = network, per_sample
        self.written = network.written

    @property
    def reports(self) -> list[PassReport]:
        """Those of the network."""
        return self.network.reports

    def tensor(self, number: float, x: Tensor) -> Tensor:
        """What the network takes for ``number``; see `tensor_of`."""
        return tensor_of(number, x, self._per_sample)

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run; the second of ``leaves`` is a tensor."""
        return self.network(leaves)

    def prepare(self, timesteps: Iterable[int]) -> None:
        """As `CompiledNetwork.prepare`."""
        self.network.prepare(timesteps)

    def refresh(self) -> None:
        """As `CompiledNetwork.refresh`."""
        self.network.refresh()

    @property
    def alone(self) -> bool:
        """As `CompiledNetwork.alone`."""
        return self.network.alone

    @property
    def moves(self) -> int:
        """As `CompiledNetwork.moves`."""
        return self.network.moves

    def listed(self, stage: Stage) -> str:
        """As `CompiledNetwork.listed`."""
        return self.network.listed(stage)

    def nbytes(self) -> int:
        """As `CompiledNetwork.nbytes`."""
        return self.network.nbytes()

    def changed(self) -> str | None:
        """As `CompiledNetwork.changed`."""
        return self.network.changed()


def numbered(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    workspace: Workspace,
) -> Numbered | WithoutGraph:
    """For (x, number, ...): a network that serves every number, or what runs the modules.

    The modules run where two timesteps do not tell the readings apart: where the results are the
    same for both, as those of a last layer that is still zero; until the next `refresh` then.

    Raises what the model itself raises for these arguments.
    """
    x, number, *rest = args
    leaves = pytree.tree_leaves((args, kwargs))
    plain = without_graph(model, args, kwargs, settings.dtype, leaves, "the timestep is a number")
    if plain.alone or not have_values(leaves):
        return plain

    def result(t: Any) -> Any:
        try:
            with torch.random.fork_rng(devices=[]):  # the same numbers for each
                return plain.result(pytree.tree_leaves(((x, t, *rest), kwargs)))
        except Exception:  # the model refuses such a timestep, in words of its own
            return None

    expected = result(number)
    other = next((n for n in _others(number) if _differ(result(n), expected)), None)
    if other is None:
        plain.remark("no other number gives another result; refresh() looks again", passing=True)
        return plain
    pair = ((number, expected), (other, result(other)))
    for per_sample in (True, False):
        if not all(_agree(result(tensor_of(n, x, per_sample)), exact, pair) for n, exact in pair):
            continue
        given = (x, tensor_of(number, x, per_sample), *rest)
        network = compiled(model, given, kwargs, settings, workspace)
        if not isinstance(network, WithoutGraph):
            return Numbered(network, per_sample)
        plain.remark(f"with a tensor in its place, {network.reports[0].note}")
        return plain
    plain.remark("the model does not take a tensor in its place")
    return plain


def tensor_of(number: float, x: Tensor, per_sample: bool) -> Tensor:
    """What stands for ``number``: [N] or [], of int64, or of float64 where x is, or of the default
    float.
    """
    dtype = torch.int64
    if isinstance(number, (float, np.floating)):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.get_default_dtype()
    return torch.full(x.shape[:1] if per_sample else (), number, dtype=dtype, device=x.device)


def _others(number: Any) -> Iterator[Any]:
    """Timesteps of the same type that a model takes which takes ``number``: none is larger, as an
    embedding may end there, except than 0.
    """
    whole = isinstance(number, (int, np.integer))
    values = (number // 2, 0, number - 1, 1) if whole else (number / 2, 0.0, 1.0)
    for value in values:
        if 0 <= value < number or value > number == 0:
            yield type(number)(value)


def _differ(result: Any, expected: Any) -> bool:
    """Whether two timesteps show in what the model makes of them."""
    a, b = _numbers(result), _numbers(expected)
    if a is None or b is None or a.shape != b.shape:
        return False
    return bool((a - b).norm() > 10 * _rounding(expected) * b.norm())  # not where one is NaN


def _agree(result: Any, expected: Any, pair: Sequence[tuple[Any, Any]]) -> bool:
    """Whether they are one result, as surely as the two of ``pair`` are two."""
    found, wanted = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    if [_kind(leaf) for leaf in found] != [_kind(leaf) for leaf in wanted]:
        return False
    a, b = _numbers(result), _numbers(expected)
    one, other = (_numbers(exact) for _, exact in pair)
    assert a is not None
    assert b is not None
    assert one is not None
    assert other is not None
    limit = _SAME * (one - other).norm() + _rounding(expected) * b.norm()
    return bool((a - b).norm() <= limit)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _numbers(result: Any) -> Tensor | None:
    """All tensors of a result in one line, float64 [K]; None where there is no result."""
    if result is None:
        return None
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([t.detach().double().reshape(-1) for t in real]) if real else None


def _rounding(result: Any) -> float:
    precise = (torch.float32, torch.float64, torch.complex64, torch.complex128)
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    real = [t.dtype for t in tensors if t.is_floating_point() or t.is_complex()]
    return _ROUNDING if all(dtype in precise for dtype in real) else _ROUNDING_LOWERED
