"""Methods put over those of one object, and taken away again.

The replacements are methods of a second object that knows the first. They lie in the first one's
``__dict__``, so that its class, its modules and its state dict stay as they are. Copies and pickles
carry both objects, each copy its own pair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

NAME = "_stepfuse"  # in the ``__dict__`` of an accelerated object: what was done to it


class Fast(ABC):
    """The base of what replaces an object's methods."""

    def __init__(self) -> None:
        self.replaced: tuple[str, ...] = ()
        self.hidden: dict[str, Any] = {}

    @abstractmethod
    def explain(self) -> str:
        """What is replaced, and what is not and why."""

    def theirs(self, obj: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call what ``name`` was before."""
        if name in self.hidden:
            return self.hidden[name](*args, **kwargs)
        return getattr(type(obj), name)(obj, *args, **kwargs)


def install(obj: Any, fast: Fast, names: Iterable[str]) -> None:
    """Put the methods ``names`` of ``fast`` over those of ``obj``."""
    held = vars(obj)
    fast.replaced = tuple(names)
    fast.hidden = {name: held[name] for name in fast.replaced if name in held}
    for name in fast.replaced:
        held[name] = getattr(fast, name)
    held[NAME] = fast


def installed(obj: Any) -> Fast | None:
    """What was installed on this object."""
    fast: Fast | None = vars(obj).get(NAME)
    return fast


def remove(obj: Any) -> Any:
    """Take away what was installed, if anything was, and return the object."""
    fast = installed(obj)
    if fast is not None:
        held = vars(obj)
        del held[NAME]
        for name in fast.replaced:
            del held[name]
        held.update(fast.hidden)
    return obj


def report(obj: Any) -> str:
    """What is replaced on this object, in words."""
    fast = installed(obj)
    return "not accelerated" if fast is None else fast.explain()


def class_name(obj: Any) -> str:
    """The full name of the object's class."""
    return f"{type(obj).__module__}.{type(obj).__qualname__}"
