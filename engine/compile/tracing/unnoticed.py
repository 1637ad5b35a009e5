"""torch.export is the business of the thread that traces: no other is told that it is exporting.

``torch.compiler.is_exporting`` answers for the whole process. While one thread exports, functions
that another one calls annotate a graph that is not theirs, and fail where the two meet; optimizers
and modules take the way that is meant for tracers.
"""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stepfuse.kernels import torch_names

_ASKED = ("is_exporting", "is_compiling")  # of torch.compiler


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Inside, other threads are not exporting, and a failure of this one is not printed.

    For one thread at a time.
    """
    from torch.fx import graph_module

    # large, and most networks are traced without it
    tracing: Any = torch_names.find("torch.export", "_trace")
    here = threading.get_ident()
    printing = [module for module in (tracing, graph_module) if module is not None]

    def answering(asked: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: threading.get_ident() == here and asked()

    def printed(*values: Any, **options: Any) -> None:
        if threading.get_ident() != here:
            builtins.print(*values, **options)

    compiler: Any = torch.compiler
    before = {name: getattr(compiler, name) for name in _ASKED}
    for name, asked in before.items():
        setattr(compiler, name, answering(asked))
    for module in printing:
        vars(module)["print"] = printed
    try:
        yield
    finally:
        for name, asked in before.items():
            setattr(compiler, name, asked)
        for module in printing:
            del vars(module)["print"]
