"""Drop-in acceleration: `accelerate` makes an object of another library fast, `restore` undoes it.

One module per library, imported when an object may be of it. Each has

    SUPPORTED                        what it takes, in words
    supports(obj) -> bool            is this one of those?
    accelerate(obj, **options)       change obj in place and return it
    restore(obj)                     take every change back and return it
    explain(obj) -> str              what is replaced, and why not the rest
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeVar

from stepfuse.engine.adapters.patch import class_name

Object = TypeVar("Object")

# adapter: the package its objects come from; None where they are recognised by what they have
_LIBRARIES = {
    "diffusers": "diffusers",
    "lucidrains": "denoising_diffusion_pytorch",
    "guided_diffusion": None,
}


def accelerate(obj: Object, **options: Any) -> Object:
    """Make a pipeline, scheduler or diffusion of another library fast, in place, and return it.

        pipe = sf.accelerate(pipe)       # same calls, same results
        pipe = sf.restore(pipe)          # as it was

    The options are those of the adapter: see ``stepfuse.engine.adapters.<library>.accelerate``.
    An object that is accelerated already is restored first, so that the last options hold.

    Raises TypeError for an object that no adapter takes, with what is supported, and for an option
    that its adapter has not, with those it has.
    """
    adapter = _adapter(obj)
    parameters = inspect.signature(adapter.accelerate).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        accepted = [parameter.name for parameter in parameters][1:]
        for name in options:
            if name not in accepted:
                raise TypeError(
                    f"accelerate has no option {name!r} for {class_name(obj)}; "
                    f"accepted: {', '.join(accepted) or 'none'}"
                )
    fast: Object = adapter.accelerate(obj, **options)
    return fast


def restore(obj: Object) -> Object:
    """Undo `accelerate` exactly and return the object.

    One that was not accelerated stays as it is.
    Raises TypeError for an object that no adapter takes, with what is supported.
    """
    plain: Object = _adapter(obj).restore(obj)
    return plain


def explain(obj: Any) -> str:
    """What of an accelerated object is replaced, and why not the rest.

    Raises TypeError for an object that no adapter takes, with what is supported.
    """
    text: str = _adapter(obj).explain(obj)
    return text


def _adapter(obj: Any) -> ModuleType:
    """The module that takes this object; TypeError with what all of them take."""
    found = _find(obj)
    if found is None:
        parts = [name for name, part in _held(obj).items() if _find(part) is not None]
        helps = [f"; accelerate(obj.{name}) would do" for name in parts[:1]]
        supported = "; ".join(_supported())
        raise TypeError(
            f"cannot accelerate {class_name(obj)}; supported: {supported}{''.join(helps)}"
        )
    return found


def _find(obj: Any) -> ModuleType | None:
    for name, library in _LIBRARIES.items():
        # an object of a library exists only where the library was imported
        if library is None or library in sys.modules:
            adapter = _module(name)
            if adapter.supports(obj):
                return adapter
    return None


def _held(obj: Any) -> dict[str, Any]:
    """The attributes of an object by name, with the submodules of a module."""
    held = getattr(obj, "__dict__", {})
    return {**held, **held["_modules"]} if isinstance(held.get("_modules"), dict) else dict(held)


def _supported() -> Iterator[str]:
    for name, library in _LIBRARIES.items():
        if library is not None and importlib.util.find_spec(library) is None:
            yield f"objects of {library} (which is not installed)"
        else:
            yield from _module(name).SUPPORTED


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
