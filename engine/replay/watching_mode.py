"""Dispatch modes that do not load PyTorch's compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from stepfuse.kernels.torch_names import TorchDispatchMode, loaded_compiler


class WatchingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A `TorchDispatchMode` whose handler torch.compile leaves alone, once that is there.

    PyTorch sees to it for every mode by importing its compiler at the first operation: one to two
    seconds and 140 MB for whoever never compiles anything.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)  # type: ignore[no-untyped-call]
        handler = cls.__dict__.get("__torch_dispatch__")
        if handler is not None:
            cls.__torch_dispatch__ = _left_alone(handler)  # type: ignore[method-assign]


def _left_alone(handler: Callable[..., Any]) -> Callable[..., Any]:
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            dynamo = loaded_compiler()
            disable = getattr(dynamo, "disable", None)  # which it has once it is imported whole
            if disable is None:
                return handler(*args, **kwargs)
            disabled.append(disable(handler, recursive=True))
        return disabled[0](*args, **kwargs)

    return handle
