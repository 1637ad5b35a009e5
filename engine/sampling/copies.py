"""Copies and pickles of objects that hold buffers and locks of their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Copyable:
    """What is copied is what the object was built from; a copy makes the rest anew.

    A subclass names in ``OWN`` the attributes that belong to one object alone and makes them in
    ``_renew``. Raises TypeError that names the part which cannot be copied or pickled.
    """

    OWN: tuple[str, ...] = ()

    def _renew(self) -> None:
        """Make the attributes of ``OWN``."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._renew()

    def __copy__(self) -> Any:
        return self._with(self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made  # a part may know the whole
        state = {}
        for name, value in self.__getstate__().items():
            with self._refusing("copy", name, value):
                state[name] = copy.deepcopy(value, memo)
        made.__setstate__(state)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle has no way to say which part of an object failed, so each is tried before
        for name, value in self.__getstate__().items():
            with self._refusing("pickle", name, value):
                _Trial().dump(value)
        return super().__reduce_ex__(max(protocol, 2))

    def _with(self, state: dict[str, Any]) -> Any:
        made = type(self).__new__(type(self))
        made.__setstate__(state)
        return made

    @contextmanager
    def _refusing(self, verb: str, name: str, value: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            part = getattr(value, "model", value) if name == "denoiser" else value
            named = "model" if name == "denoiser" else name.lstrip("_")
            raise TypeError(
                f"cannot {verb} this {type(self).__name__}: its {named}, {_described(part)}, "
                f"does not let itself be: {' '.join(str(error).split())}"
            ) from error


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _Trial(pickle.Pickler):
    """Pickles everything but the contents of tensors, to nowhere."""

    def __init__(self) -> None:
        super().__init__(_Nowhere())

    def persistent_id(self, value: Any) -> str | None:
        """Tensors pickle, and may be large; a part that knows the whole would begin again."""
        return "left out" if isinstance(value, (Tensor, Copyable)) else None


def _described(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else f"a {type(value).__qualname__}"
