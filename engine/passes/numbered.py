"""A timestep given as a Python number: one network serves them all, with the number as a tensor.

A graph would keep the number, and every other one would be compiled anew. Which kind of tensor the
model takes instead is found out by comparing results: one entry per sample, as the model contract
has it, or a tensor without dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from stepfuse.engine.passes.compiled import Compiled, Settings, compiled
from stepfuse.engine.passes.without_graph import WithoutGraph
from stepfuse.engine.passes.workspace import Workspace

# of relative L2: far above rounding, far below what another timestep does
_SAME, _SAME_LOWERED = 1e-3, 1e-1


class Numbered:
    """``network``, made for a tensor where the model was given a number; see `Network`."""

    def __init__(self, network: Compiled, per_sample: bool) -> None:
        self.network, self._per_sample = network, per_sample
        self.written = network.written

    @property
    def reports(self) -> list[Any]:
        """Those of the network."""
        return self.network.reports

    def tensor(self, number: float, x: Tensor) -> Tensor:
        """What the network takes for ``number``: [N] or [], int64 or the default float."""
        shape = x.shape[:1] if self._per_sample else ()
        dtype = torch.get_default_dtype() if isinstance(number, float) else torch.int64
        return torch.full(shape, number, dtype=dtype, device=x.device)

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run; the second of ``leaves`` is a tensor."""
        return self.network(leaves)

    def prepare(self, timesteps: Iterable[int]) -> None:
        """As `Network.prepare`."""
        self.network.prepare(timesteps)

    def refresh(self) -> None:
        """As `Network.refresh`."""
        self.network.refresh()

    @property
    def alone(self) -> bool:
        """As `Network.alone`."""
        return self.network.alone

    def nbytes(self) -> int:
        """As `Network.nbytes`."""
        return self.network.nbytes()

    def changed(self) -> str | None:
        """As `Network.changed`."""
        return self.network.changed()


def numbered(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    workspace: Workspace,
) -> Numbered | WithoutGraph:
    """For (x, number, ...): a network that serves every number, or what runs the modules.

    Raises what the model itself raises for these arguments.
    """
    x, number, *rest = args
    reason = "the timestep is a number, and the model does not take a tensor in its place"
    plain = WithoutGraph(model, args, kwargs, settings.dtype, reason)
    expected = plain(pytree.tree_leaves((args, kwargs)))
    for per_sample in (True, False):
        draft = Numbered(plain, per_sample)
        given = (x, draft.tensor(number, x), *rest)
        try:
            network = compiled(model, given, kwargs, settings, workspace)
            result = network(pytree.tree_leaves((given, kwargs)))
        except Exception:  # the model refuses such a tensor, in words of its own
            continue
        limit = _SAME if settings.dtype is None else _SAME_LOWERED
        if not isinstance(network, WithoutGraph) and _agree(result, expected, limit):
            return Numbered(network, per_sample)
    return plain


def _agree(result: Any, expected: Any, limit: float) -> bool:
    found, wanted = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    return len(found) == len(wanted) and all(
        _is_same(a, b, limit) for a, b in zip(found, wanted, strict=True)
    )


def _is_same(a: Any, b: Any, limit: float) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if isinstance(a, FakeTensor):
        return True
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= limit * b.norm())
