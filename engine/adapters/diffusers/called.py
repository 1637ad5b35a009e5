"""The forward of a model, as compiled networks call it: x first, then the timestep."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepfuse.engine.adapters.diffusers.arguments import Parameters
from stepfuse.kernels.torch_names import pytree


class WritesToArgument(RuntimeError):
    """The forward puts something into a list or dict it is given; ``argument`` is its name."""

    def __init__(self, argument: str) -> None:
        self.argument = argument
        super().__init__(f"forward writes to its argument {argument}")


class Called(nn.Module):
    """The forward of a module, by its class, called with x and, where it takes one, the timestep.

    A graph would not write to the caller's lists and dicts, a cache of keys say: `WritesToArgument`
    is raised where the forward does. To take something out of them is no such thing.
    """

    def __init__(self, module: nn.Module, parameters: Parameters) -> None:
        super().__init__()
        self.module = module
        self._x, self._time = parameters.x, parameters.time

    def forward(self, x: Tensor, /, *timestep: Any, **condition: Any) -> Any:
        """What the module makes of x [N, ...], the timestep, if it takes one, and the rest."""
        held = {name: pytree.tree_leaves(value) for name, value in condition.items()}
        given = {self._x: x, **({} if self._time is None else {self._time: timestep[0]})}
        result = type(self.module).forward(self.module, **given, **condition)
        for name, value in condition.items():
            if not _marks(pytree.tree_leaves(value)) <= _marks(held[name]):
                raise WritesToArgument(name)
        return result


def _marks(leaves: list[Any]) -> set[Any]:
    """What tells leaves from others: tensors by identity, as long as the leaves are held."""
    return {("tensor", id(v)) if isinstance(v, Tensor) else (type(v), v) for v in leaves}
