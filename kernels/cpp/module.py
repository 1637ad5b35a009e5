"""Loads the C++ module built for the best instruction set that this processor has.

``native`` is that module, ``isa`` its name, ``threads`` what bounds the threads of a call. The
environment variable STEPFUSE_ISA (baseline, avx2 or avx512) asks for another, to compare or to
test; results agree within the tolerance of the arithmetic. Importing raises ImportError where no
module was built, ValueError where STEPFUSE_ISA cannot be honoured.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

ISAS = ("avx512", "avx2", "baseline")  # best first


def _load() -> tuple[ModuleType, str]:
    built = [isa for isa in ISAS if importlib.util.find_spec(f"stepfuse._cpu_{isa}") is not None]
    if "baseline" not in built:
        raise ImportError("stepfuse was installed without a C++ compiler")
    supported = importlib.import_module("stepfuse._cpu_baseline").supported()
    usable = [isa for isa in built if isa in supported]
    wanted = os.environ.get("STEPFUSE_ISA") or usable[0]
    if wanted not in usable:
        raise ValueError(
            f"STEPFUSE_ISA must be one of {', '.join(usable)} here; got {wanted!r} "
            f"(built: {', '.join(built)}; this processor runs: {', '.join(supported)})"
        )
    return importlib.import_module(f"stepfuse._cpu_{wanted}"), wanted


native, isa = _load()
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/ops.h
threads = torch.get_num_threads  # of the calling thread, which torch.set_num_threads governs
