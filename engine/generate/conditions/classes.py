"""The classes of a model, and how a label is written: a name, a number or "none"."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

NO_CLASS = "none"
_FEW = 20  # names that an error still lists
_MOST_DIGITS = 20


@dataclass(frozen=True)
class Classes:
    """The names of a model's classes; none for a model without classes.

    The number after the last class is the null class, as `Checkpoint.num_classes` has it.
    """

    names: tuple[str, ...]

    def __len__(self) -> int:
        """How many classes there are, which is the number of the null class."""
        return len(self.names)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        # of two classes of one name the first is meant
        return {name: k for k, name in reversed(list(enumerate(self.names)))}

    def number(self, text: str, what: str) -> int | None:
        """The number of the class that ``text`` means, the null class for "none".

        A name goes before a number. None where the model has no classes, which takes "none" alone.

        Raises ValueError for everything else; ``what``, "--label" say, opens the message.
        """
        if text == NO_CLASS:
            return len(self) if self.names else None
        if not self.names:
            raise ValueError(
                f"{what} must be {NO_CLASS}, as the model has no classes; got {text!r:.100}"
            )
        known = self._numbers.get(text)
        if known is not None:
            return known
        if text.isdecimal() and len(text) <= _MOST_DIGITS and int(text) < len(self):
            return int(text)
        few = len(self) <= _FEW
        accepted = ", ".join(self.names) if few else f"a class name, 0 .. {len(self) - 1}"
        raise ValueError(f"{what} must be one of {accepted} or {NO_CLASS}; got {text!r:.100}")
