"""Whether an operator runs on this machine, asked of the operator itself, once.

No list says which operators a release of PyTorch or oneDNN has for a dtype on a processor: some
raise for want of a kernel, some for want of an instruction set, some only for a layout or for two
dtypes at once. So an operator is run once on zeros of the shapes, strides and dtypes that it would
get, and what came of it is kept as long as the process runs.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from stepfuse.engine.compile.heap import trim
from stepfuse.engine.compile.tracing.quiet import quietly
from stepfuse.kernels.products import vector_channels, why_not
from stepfuse.kernels.torch_names import FakeTensor, disable_current_modes, pytree

Made = tuple[tuple[torch.Size, torch.dtype], ...]
_known: dict[Any, Made | None] = {}


def runs(target: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether ``target(*args, **kwargs)`` raises nothing, on zeros like the tensors among these."""
    return outcome(target, args, kwargs) is not None


def outcome(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Made | None:
    """(shape, dtype) of every tensor that ``target`` makes of such arguments; None if it raises.

    Tensors that have no data stand for those of their device; where that device is not here, the
    operator is asked for shapes only.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    key = (target, spec, tuple(_key(leaf) for leaf in leaves))
    if key not in _known:
        _known[key] = _run(target, leaves, spec)
        trim()
    return _known[key]


def has_instructions(device: torch.device, dtype: torch.dtype) -> bool:
    """False on a CPU that must convert every ``dtype`` number to compute with it.

    oneDNN takes bfloat16 wherever there is AVX-512, with or without instructions for it; the C++
    module is built for those that have them, and asks the processor.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    mkldnn = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        on_x86 = platform.machine() in ("x86_64", "AMD64")
        asked = on_x86 and vector_channels() > 0
        return bool(mkldnn._is_mkldnn_bf16_supported()) and not (asked and why_not(dtype))
    return bool(mkldnn._is_mkldnn_fp16_supported())


def _key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _run(target: Any, leaves: list[Any], spec: pytree.TreeSpec) -> Made | None:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    real = all(_is_here(tensor.device) for tensor in tensors)
    try:
        with torch.no_grad(), quietly():
            if real:
                made = _run_on_zeros(target, leaves, spec)
            else:
                modes = [t.fake_mode for t in tensors if isinstance(t, FakeTensor)]
                args, kwargs = pytree.tree_unflatten(leaves, spec)
                with modes[0] if modes else torch.no_grad():
                    made = target(*args, **kwargs)
    except Exception:  # whatever an operator raises, it does not run
        return None
    results = pytree.tree_leaves(made)
    return tuple((leaf.shape, leaf.dtype) for leaf in results if isinstance(leaf, Tensor))


def _is_here(device: torch.device) -> bool:
    return device.type in ("cpu", "meta") or (device.type == "cuda" and torch.cuda.is_available())


def _run_on_zeros(target: Any, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    cuda = {
        t.device.index or 0 for t in leaves if isinstance(t, Tensor) and t.device.type == "cuda"
    }
    # what draws random numbers must leave the generators as they were
    with disable_current_modes(), torch.random.fork_rng(sorted(cuda)):
        given = [_zeros_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(given, spec)
        return target(*args, **kwargs)


def _zeros_like(tensor: Tensor) -> Tensor:
    """As ``tensor`` lies in memory, gaps and repetitions included."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    span = 1 + reach if tensor.numel() else 0
    zeros = torch.zeros(span, dtype=tensor.dtype, device=tensor.device)
    return zeros.as_strided(tensor.shape, tensor.stride())
