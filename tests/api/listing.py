"""The public callables, derived from the package: a new one is here without being named."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import stepfuse as sf

OPS = ("add_noise", "denoise_step", "group_norm_silu", "philox")
ADAPTERS = ("diffusers", "guided_diffusion", "lucidrains")
ADAPTER_FUNCTIONS = ("accelerate", "restore", "explain", "supports")


def public_callables() -> dict[str, Callable[..., Any]]:
    """Every public function, constructor and method, by the name a user would write."""
    found: dict[str, Callable[..., Any]] = {}
    for name in sf.__all__:
        found.update(_of(name, getattr(sf, name)))
    for op in OPS:
        module = importlib.import_module(f"stepfuse.kernels.{op}")
        found.update(
            (f"{op}.{name}", value)
            for name, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not name.startswith("_")
        )
    found["adapters.explain"] = importlib.import_module("stepfuse.engine.adapters").explain
    for library in ADAPTERS:
        adapter = importlib.import_module(f"stepfuse.engine.adapters.{library}")
        found.update((f"{library}.{name}", getattr(adapter, name)) for name in ADAPTER_FUNCTIONS)
    lint = importlib.import_module("stepfuse.engine.sampling.lint")
    found["lint.check_capturable"] = lint.check_capturable
    return _once(found)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a caller gives, their annotations as objects where they can be."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # names that are imported for a type checker only
        signature = inspect.signature(function)
    given = dict(signature.parameters)
    given.pop("self", None)
    return given


def _of(name: str, value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    if isinstance(value, ModuleType):
        for inner in value.__all__:
            for found, function in _of(inner, getattr(value, inner)):
                yield f"{name}.{found}", function
    elif inspect.isclass(value):
        # the constructor of an exception takes its message
        if not issubclass(value, BaseException):
            yield name, value
            yield from _methods(name, value)
    elif callable(value):
        yield name, value


def _methods(name: str, kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Methods that this project wrote for a class or for one below it."""
    seen = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("stepfuse."):
            continue
        for method, raw in vars(base).items():
            function = getattr(kind, method)
            public = not method.startswith("_") and method not in seen
            if (public and isinstance(raw, (classmethod, staticmethod))) or (
                public and inspect.isfunction(raw)
            ):
                seen.add(method)
                yield f"{name}.{method}", function


def _once(found: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The same without what is there under a shorter name."""
    chosen: dict[str, Callable[..., Any]] = {}
    homes = set()
    for name in sorted(found, key=lambda name: (name.count("."), len(name))):
        function = found[name]
        home = (function.__module__, function.__qualname__, getattr(function, "__self__", None))
        if home not in homes:
            homes.add(home)
            chosen[name] = function
    return dict(sorted(chosen.items()))
