"""Every private name of PyTorch that this package reads, in one place, with where it is known.

PyTorch may rename what begins with an underscore in any release. Each name below has been looked up
in `KNOWN`, the oldest release that is supported, one in the middle and the newest: there it is. The
rest of the package imports the names from here, without their underscores. What the package can do
without is `OPTIONAL`: absent, it is None here, and what is left out then is said beside it. A name
that is not optional and absent is an ImportError that names it.

What hangs on a tensor or a module (``tensor._version``, ``module._parameters``) is no name of a
module, and stands where it is used. Nothing here imports PyTorch's compiler.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import _pop_mode_temporarily as pop_function_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map_only

__all__ = [
    "KNOWN",
    "NAMES",
    "OPTIONAL",
    "DropoutNd",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "NormBase",
    "OpOverload",
    "TorchDispatchMode",
    "TreeSpec",
    "UnsupportedOperatorException",
    "below_autograd",
    "clear_cublas_workspaces",
    "disable_current_modes",
    "end_allocate_to_pool",
    "find",
    "foreach_lerp_",
    "functorch_is_active",
    "has_kernel",
    "increment_version",
    "is_alias_of",
    "len_dispatch_stack",
    "len_function_stack",
    "loaded_compiler",
    "make_subclass",
    "modes_stay_on",
    "parse_to",
    "peek_functorch",
    "pop_function_mode",
    "profiler_is_on",
    "pytree",
    "release_pool",
    "set_grad_enabled",
    "set_versions",
    "storage_users",
    "tracing_state",
    "tree_leaves",
    "tree_map_only",
    "use_lazy_graph_module",
    "without_subclasses",
]

KNOWN = ("2.6.0", "2.11.0", "2.13.0")

# module: its private names
NAMES: dict[str, tuple[str, ...]] = {
    "torch": ("_foreach_lerp_",),
    "torch.Tensor": ("_make_subclass",),
    "torch._C": (
        "DisableTorchFunction",
        "DisableTorchFunctionSubclass",
        "_AutoDispatchBelowAutograd",
        "_are_functorch_transforms_active",
        "_dispatch_has_kernel_for_dispatch_key",
        "_get_tracing_state",
        "_increment_version",
        "_is_alias_of",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
        "_set_grad_enabled",
    ),
    "torch._C._autograd": ("_profiler_enabled", "_unsafe_set_version_counter"),
    "torch._C._functorch": ("peek_interpreter_stack",),
    "torch._C._nn": ("_parse_to",),
    "torch._ops": ("OpOverload",),
    "torch._subclasses.fake_tensor": (
        "FakeTensor",
        "FakeTensorMode",
        "UnsupportedOperatorException",
    ),
    "torch._subclasses.functional_tensor": ("FunctionalTensor",),
    "torch.nn.modules.batchnorm": ("_NormBase",),
    "torch.nn.modules.dropout": ("_DropoutNd",),
    "torch.overrides": ("_pop_mode_temporarily",),
    "torch.utils._python_dispatch": ("TorchDispatchMode", "_disable_current_modes"),
    "torch.utils._pytree": (
        "TreeSpec",
        "tree_flatten",
        "tree_leaves",
        "tree_map",
        "tree_map_only",
        "tree_unflatten",
    ),
}

# what is done without a name
OPTIONAL: dict[str, dict[str, str]] = {
    "torch._C": {
        # builds of 2.6 without CUDA lack it
        "_storage_Use_Count": "no weight is moved out of memory: it may have other users",
        # builds without CUDA lack these
        "_cuda_clearCublasWorkspaces": "cuBLAS keeps its memory from one capture to the next",
        "_cuda_endAllocateToPool": "the memory of a capture that failed is not given back",
        "_cuda_releasePool": "the memory of a capture that failed is not given back",
    },
    "torch.fx._lazy_graph_module": {"_use_lazy_graph_module": "networks go through torch.export"},
    # imported by whoever traces
    "torch.export": {"_trace": "other threads may see that one exports"},
    "torch.export._trace": {"_override_builtin_ops": "other threads may see exchanged builtins"},
    "torch.fx": {"_symbolic_trace": "other threads may see exchanged methods"},
    "torch.fx._symbolic_trace": {"_Patcher": "other threads may see exchanged methods"},
    # of the benchmarks alone
    "torch._dynamo": {"config": "torch.compile cannot be compared with"},
    "torch._inductor": {"config": "torch.compile cannot be compared with"},
}


def find(module: str, name: str) -> Any:
    """The object, or None where this PyTorch has no such module or name.

    Raises KeyError for a name that stands in neither table.
    """
    if name not in NAMES.get(module, ()) and name not in OPTIONAL.get(module, {}):
        raise KeyError(f"{module}.{name} is not among the names of stepfuse.kernels.torch_names")
    try:
        if module == "torch.Tensor":
            return getattr(Tensor, name, None)
        place = importlib.import_module(module)
        if not hasattr(place, name):
            return importlib.import_module(f"{module}.{name}")
        return getattr(place, name)
    except ImportError:
        return None


def _needed(module: str, name: str) -> Any:
    found = find(module, name)
    if found is None:
        raise ImportError(
            f"PyTorch {torch.__version__} has no {module}.{name}, which stepfuse reads; known in "
            f"{', '.join(KNOWN)}"
        )
    return found


len_dispatch_stack = _needed("torch._C", "_len_torch_dispatch_stack")
len_function_stack = _needed("torch._C", "_len_torch_function_stack")
functorch_is_active = _needed("torch._C", "_are_functorch_transforms_active")
peek_functorch = _needed("torch._C._functorch", "peek_interpreter_stack")
tracing_state = _needed("torch._C", "_get_tracing_state")
profiler_is_on = _needed("torch._C._autograd", "_profiler_enabled")
set_grad_enabled = _needed("torch._C", "_set_grad_enabled")  # as function modes see it

below_autograd = _needed("torch._C", "_AutoDispatchBelowAutograd")
without_subclasses = _needed("torch._C", "DisableTorchFunctionSubclass")

increment_version = _needed("torch._C", "_increment_version")
is_alias_of: Callable[[Tensor, Tensor], bool] = _needed("torch._C", "_is_alias_of")
has_kernel: Callable[[str, str], bool] = _needed(
    "torch._C", "_dispatch_has_kernel_for_dispatch_key"
)
parse_to = _needed("torch._C._nn", "_parse_to")
foreach_lerp_ = _needed("torch", "_foreach_lerp_")
make_subclass = _needed("torch.Tensor", "_make_subclass")
NormBase = _needed("torch.nn.modules.batchnorm", "_NormBase")
DropoutNd = _needed("torch.nn.modules.dropout", "_DropoutNd")

use_lazy_graph_module = find("torch.fx._lazy_graph_module", "_use_lazy_graph_module")
_use_count = find("torch._C", "_storage_Use_Count")
clear_cublas_workspaces: Any = find("torch._C", "_cuda_clearCublasWorkspaces")
end_allocate_to_pool: Any = find("torch._C", "_cuda_endAllocateToPool")
release_pool: Any = find("torch._C", "_cuda_releasePool")
_set_version = _needed("torch._C._autograd", "_unsafe_set_version_counter")


def loaded_compiler() -> Any:
    """The module of torch.compile where somebody has imported it, whole or in part; else None."""
    return sys.modules.get("torch._dynamo")


@contextmanager
def modes_stay_on() -> Iterator[None]:
    """Inside, ``DisableTorchFunction`` leaves function modes on, as its sister for subclasses does.

    For whoever names it inside: one at a time, in all threads.
    """
    here: Any = torch._C
    before = here.DisableTorchFunction
    here.DisableTorchFunction = without_subclasses
    try:
        yield
    finally:
        here.DisableTorchFunction = before


def set_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Let each tensor count as written to so many times."""
    try:
        _set_version(tuple(tensors), tuple(versions))
    except TypeError:  # 2.6 takes one at a time
        for tensor, version in zip(tensors, versions, strict=True):
            _set_version(tensor, version)


def storage_users(tensor: Tensor) -> int | None:
    """How many hold the memory of the tensor; None where PyTorch does not tell."""
    return None if _use_count is None else int(_use_count(tensor.untyped_storage()._cdata))
