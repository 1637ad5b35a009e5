"""Attributes that are read and not assigned."""

from __future__ import annotations

from typing import Any, ClassVar


class Fixed:
    """An object that keeps what it was built with.

    ``FIXED`` has the attributes that cannot be assigned after they were set, each with what to do
    instead. Methods that change several of them at once say so by ``vars(self).update``.

    Raises AttributeError where one is assigned or deleted, which would have no effect on what was
    made from it.
    """

    FIXED: ClassVar[dict[str, str]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.FIXED and name in vars(self):
            raise AttributeError(f"{self._names(name)} cannot be assigned: {self.FIXED[name]}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.FIXED:
            raise AttributeError(f"{self._names(name)} cannot be deleted: {self.FIXED[name]}")
        super().__delattr__(name)

    def _names(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"
