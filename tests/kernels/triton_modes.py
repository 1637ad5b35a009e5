"""Run the Triton backend on CPU tensors: in its interpreter, or as the PTX it compiles to.

    with interpreted():                    # numerics of the kernel source, nothing compiled
        group_norm_silu(x, ..., backend="triton")
    with simulated(90) as launches:        # executes the PTX for sm_90; skips without PTXSIM
        add_noise(x, ..., backend="triton")

Both work in one process with ahead-of-time compilation: the decorated kernels stay as they are, and
only what happens at a launch is exchanged for the length of the ``with`` block.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from stepfuse.kernels import backends

PTXSIM = os.environ.get("PTXSIM", "")
NO_PTXSIM = "PTXSIM does not name the folder that contains the package ptxsim"
# the decorator decides when Triton is imported: with the variable set there is nothing to compile
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_compiler = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1: no kernel is compiled")
needs_ptxsim = pytest.mark.skipif(not PTXSIM, reason=NO_PTXSIM)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, Triton kernels run in its interpreter and backend="triton" takes CPU tensors."""
    pytest.importorskip("triton")
    if INTERPRET:  # every kernel is an interpreted one already
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang
    from triton.runtime.jit import JITFunction

    functions: dict[Any, Any] = {}

    def function(kernel: Any) -> Any:
        # keyed by the raw function: the hash of a JITFunction walks all that it refers to
        if kernel.fn not in functions:
            functions[kernel.fn] = InterpretedFunction(kernel.fn)
        return functions[kernel.fn]

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        function(self).run(*args, grid=grid, warmup=warmup, **options)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        # InterpretedFunction.__call__ leaves triton.language patched, which breaks the compiler
        patches = _patch_lang(self.fn)
        try:
            return function(self).rewrite()(*args, **options)
        finally:
            patches.restore()

    real = JITFunction.run, JITFunction.__call__
    JITFunction.run, JITFunction.__call__ = run, call
    try:
        # exp(-x) of a large -x is infinite on a GPU too, where nobody warns
        with backends.triton_on_cpu(), np.errstate(over="ignore"):
            yield
    finally:
        JITFunction.run, JITFunction.__call__ = real


@contextmanager
def simulated(arch: int, **settings: Any) -> Iterator[list[Any]]:
    """Inside, launches are compiled for sm_<arch> and their PTX is executed on CPU tensors.

    Yields the list of launches, each with ``stats`` (bytes, sectors), ``ptx`` and ``resources()``.
    """
    if not PTXSIM:
        pytest.skip(NO_PTXSIM)
    if INTERPRET:
        pytest.skip("TRITON_INTERPRET=1: no kernel is compiled")
    if PTXSIM not in sys.path:
        sys.path.append(PTXSIM)
    from ptxsim import memory
    from ptxsim import simulated as launches

    real = memory.track

    def track(m: Any, parts: Any, size: int, write: bool) -> None:
        # the race check wants one address a thread, and gets one in all where it is uniform
        if len(parts) == 1 and parts[0][1] is None and len(parts[0][2]) == 1:
            parts = [(parts[0][0], None, np.repeat(parts[0][2], m.active()))]
        real(m, parts, size, write)

    memory.track = track
    try:
        with backends.triton_on_cpu(), launches(arch=arch, **settings) as log:
            yield log
    finally:
        memory.track = real
