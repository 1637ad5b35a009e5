"""Labels without a file: a function of the image's number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepfuse.engine.generate.conditions.classes import NO_CLASS, Classes
from stepfuse.engine.generate.conditions.row import Row, check_span
from stepfuse.kernels import philox
from stepfuse.kernels.checks import as_integer
from stepfuse.kernels.limits import check_seed

# The initial x_T has the timestep `philox.INITIAL`, the steps have those of a schedule, which are
# below 2^24: noise and labels of one seed share no counter.
STREAM = philox.INITIAL - 1
MOST_CLASSES = 2**31 - 1
ORDERS = ("turn", "random")


class Labels(ABC):
    """Conditions that are a label and nothing else; there are some for every image."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the labels, in JSON."""

    @abstractmethod
    def labels(self, first: int, count: int) -> list[int | None]:
        """The labels of images first .. first+count-1."""

    def rows(self, first: int, count: int) -> list[Row]:
        """The same as rows."""
        check_span(first, count)
        return [Row(label) for label in self.labels(first, count)]

    def check(self, n: int) -> None:
        """There is a label for every image; ValueError for a negative number of them."""
        check_span(0, n)


@dataclass(frozen=True)
class Turn(Labels):
    """Labels take turns: image n has ``chosen[n % len(chosen)]``, as in ``stepfuse sample``."""

    chosen: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen", _numbers(self.chosen))

    def settings(self) -> dict[str, Any]:
        """The labels in their order."""
        return {"kind": "turn", "labels": list(self.chosen)}

    def labels(self, first: int, count: int) -> list[int | None]:
        """One after the other."""
        length = len(self.chosen)
        return [self.chosen[n % length] for n in range(first, first + count)]


@dataclass(frozen=True)
class PerClass(Labels):
    """Every label for ``images`` images in a row: ``chosen[n // images % len(chosen)]``."""

    chosen: tuple[int, ...]
    images: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen", _numbers(self.chosen))
        if as_integer("images per class", self.images) < 1:
            raise ValueError(f"images per class must be at least 1; got {self.images}")

    def settings(self) -> dict[str, Any]:
        """The labels in their order, and how long each lasts."""
        return {"kind": "per_class", "labels": list(self.chosen), "images": self.images}

    def labels(self, first: int, count: int) -> list[int | None]:
        """Blocks of one label."""
        length = len(self.chosen)
        return [self.chosen[n // self.images % length] for n in range(first, first + count)]


@dataclass(frozen=True)
class Random(Labels):
    """Classes drawn uniformly, a pure function of (seed, n) on a Philox stream of their own.

        label = floor((2^32 a + b) classes / 2^64)

    with the first two words a, b of counter (0, `STREAM`, n); a class is off 1/classes by less
    than 2^-64.
    """

    classes: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= as_integer("classes", self.classes) <= MOST_CLASSES:
            raise ValueError(f"classes must be in 1 .. {MOST_CLASSES}; got {self.classes}")
        check_seed("seed", as_integer("seed", self.seed))

    def settings(self) -> dict[str, Any]:
        """How many classes, and the seed."""
        return {"kind": "random", "classes": self.classes, "seed": self.seed}

    def labels(self, first: int, count: int) -> list[int | None]:
        """Never the null class."""
        if not count:
            return []
        images = torch.arange(first, first + count, device="cpu")
        high, low = philox.integers(self.seed, images, STREAM, (2,)).unbind(1)
        # below 2^63: the products of a 32-bit word and a number of 31 bits
        drawn = high * self.classes + (low * self.classes >> 32) >> 32
        found: list[int | None] = drawn.tolist()
        return found


@dataclass(frozen=True)
class Fixed(Labels):
    """One label for every image."""

    label: int

    def __post_init__(self) -> None:
        _numbers((self.label,))

    def settings(self) -> dict[str, Any]:
        """The label."""
        return {"kind": "fixed", "label": self.label}

    def labels(self, first: int, count: int) -> list[int | None]:
        """The same again and again."""
        return [self.label] * count


@dataclass(frozen=True)
class NoClasses(Labels):
    """For a model without classes."""

    def settings(self) -> dict[str, Any]:
        """Nothing is chosen."""
        return {"kind": "no_classes"}

    def labels(self, first: int, count: int) -> list[int | None]:
        """None for every image."""
        return [None] * count


def choose_labels(
    labels: str | Sequence[str] | None,
    names: Sequence[str],
    seed: int = 0,
    per_class: int | None = None,
) -> Labels:
    """The labels that a user asks for.

    Args:
        labels: "turn" or "random"; or a list of labels that take turns, each the name of a class,
            its number or "none". None and an empty list stand for "turn".
        names: of the model's classes; empty for a model without.
        seed: of "random".
        per_class: images of a class before the next one's turn; one where it is None.

    Raises ValueError for what is none of these, and for labels of a model without classes.
    """
    labels = ORDERS[0] if labels is None or len(labels) == 0 else labels
    if isinstance(labels, str) and labels not in ORDERS:
        raise ValueError(f"--labels must be one of {', '.join(ORDERS)}; got {labels!r}")
    if labels == "random" and per_class is not None:
        raise ValueError(
            f"--per-class {per_class} does not go with --labels random, which draws the classes"
        )
    classes = Classes(tuple(names))
    if not classes.names:
        return _without_classes(labels, per_class)
    if labels == "random":
        return Random(len(classes), seed)
    if isinstance(labels, str):
        chosen = tuple(range(len(classes)))
    else:
        chosen = _numbers(tuple(classes.number(text, "--label") for text in labels))
    if per_class is not None:
        return PerClass(chosen, per_class)
    return Fixed(chosen[0]) if len(chosen) == 1 else Turn(chosen)


def labels_from(settings: Mapping[str, Any]) -> Labels:
    """The labels with these `Labels.settings`; ValueError for an unknown kind."""
    kind = settings.get("kind")
    if kind == "turn":
        return Turn(tuple(settings["labels"]))
    if kind == "per_class":
        return PerClass(tuple(settings["labels"]), settings["images"])
    if kind == "random":
        return Random(settings["classes"], settings["seed"])
    if kind == "fixed":
        return Fixed(settings["label"])
    if kind == "no_classes":
        return NoClasses()
    raise ValueError(
        f"kind of labels must be one of turn, per_class, random, fixed, no_classes; got {kind!r}"
    )


def _without_classes(labels: str | Sequence[str], per_class: int | None) -> NoClasses:
    if per_class is not None:
        raise ValueError(f"--per-class {per_class}: the model has no classes")
    if labels == "random":
        raise ValueError("--labels random: the model has no classes")
    asked = [] if isinstance(labels, str) else [text for text in labels if text != NO_CLASS]
    if asked:
        raise ValueError(f"--label {asked[0]}: the model has no classes")
    return NoClasses()


def _numbers(labels: Sequence[int | None]) -> tuple[int, ...]:
    """The labels, checked."""
    if not labels:
        raise ValueError("labels must hold one number at least; got none")
    for label in labels:
        if label is None or as_integer("label", label) < 0:
            raise ValueError(f"label must be a number from 0 on; got {label}")
    return tuple(label for label in labels if label is not None)
