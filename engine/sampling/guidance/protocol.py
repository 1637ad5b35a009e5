"""What a guidance is, and what one that leaves things out is taken to mean."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stepfuse.engine.compile.state.reach import is_a_users
from stepfuse.engine.sampling.denoiser import Condition
from stepfuse.engine.sampling.evaluation import Evaluation
from stepfuse.engine.sampling.uncapturable import modules_in, refusal
from stepfuse.kernels.arguments import check_flag_or_word
from stepfuse.kernels.checks import as_integer, as_number, check_flag, received


@dataclass(frozen=True)
class Outputs:
    """What a guided step is made with.

    Args:
        model: the output that takes the place of the model's, [N, C or 2C, ...].
        unguided: a second output o_u: the update then takes o_u + scale (model - o_u), with the
            scale of the step's row, without another pass over memory.
        shift: added to x after the update, [N, C, ...].
    """

    model: Tensor
    unguided: Tensor | None = None
    shift: Tensor | None = None


@runtime_checkable
class Guidance(Protocol):
    """What steers a sample; any object that has these two is one.

    It may have more, each with what holds where it is left out:

        capturable = True            False: steps run eagerly, ``outputs`` may decide on the host
        scale_at(t) -> 1.0           goes into the row of the step at timestep t
        is_active(t) -> True         False: that step is the model's alone, with one evaluation
        unconditional = None         a mapping: replaces entries of the condition, see `CFG`
        batched = False              True: ``denoiser.both`` will be asked for; "auto": it will be
                                     where ``denoiser.takes_both``
        mixture = False              True: outputs are the two of `Outputs` and nothing else, each
                                     evaluated once, so that a file can hold the step; not taken
                                     over by a class that has other ``outputs``
        check_table(table, guided, shifts_mean)     raises ValueError where it does not fit
        check_steps(method, prediction_type, several, differentiable)     the same for what is known
                                     of steps and model: whether they remember or evaluate more than
                                     once, and whether it runs under autograd
        measured_shape(shape, dtype, device)     the shape of the measurement y that has to be given
                                     with images of ``shape``: ``denoiser.measurement``
        without_autograd()           a guidance of the same operators that takes no gradient: to be
                                     looked at where gradients cannot be had (`check_capturable`)

    A captured step is made anew when attributes, globals or other Python state that ``outputs``
    reads have changed. To capture it, ``outputs`` is tried several times, and a replay runs none of
    its Python. What it writes to tensors in its attributes, in place, is taken back after the tries
    and is part of every replay; one that keeps anything else from step to step says
    ``capturable = False``.
    """

    @property
    def evaluations(self) -> int:
        """How often the model is evaluated in a guided step."""
        ...

    def outputs(
        self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Condition
    ) -> Tensor | Outputs:
        """The output of a guided step: x [N, C, ...], t int64 [N], not to be written to.

        ``denoiser(x, t, condition)`` evaluates the model. A tensor stands for `Outputs` with
        nothing else.
        """
        ...


_OPTIONAL: tuple[str, ...] = (
    *("scale_at", "is_active", "check_table", "check_steps", "measured_shape"),
    "without_autograd",
)
_TAKES = 4  # denoiser, x, t, condition


def check_guidance(guidance: object) -> None:
    """Raise TypeError or ValueError unless ``guidance`` is None or follows `Guidance`."""
    if guidance is None:
        return
    given = repr(guidance) if isinstance(guidance, type) else received(guidance)
    wanted = (
        "guidance must be a CFG, a ClassifierGuidance, an object with "
        "outputs(denoiser, x, t, condition) and evaluations, or None"
    )
    if isinstance(guidance, type):
        raise TypeError(f"{wanted}; got {given}, the class")
    missing = [name for name in ("outputs", "evaluations") if not hasattr(guidance, name)]
    if missing:
        raise TypeError(f"{wanted}; got {given}, which has no {' and no '.join(missing)}")
    there: Any = guidance
    for name in ("outputs", *_OPTIONAL):
        method = getattr(there, name, _nothing)
        if not callable(method):
            raise TypeError(f"{name} of the guidance must be callable; got {received(method)}")
    if not _takes(there.outputs, _TAKES):
        raise TypeError(
            "outputs of the guidance must take (denoiser, x, t, condition); "
            f"got outputs{inspect.signature(there.outputs)}"
        )
    if as_integer("evaluations of the guidance", there.evaluations) < 1:
        raise ValueError(f"evaluations of the guidance must be 1 or more; got {there.evaluations}")
    for name in ("capturable", "mixture"):
        check_flag(f"{name} of the guidance", getattr(there, name, False))
    batched = getattr(there, "batched", False)
    check_flag_or_word("batched of the guidance", batched, "auto")
    unconditional = getattr(there, "unconditional", None)
    if unconditional is not None and not isinstance(unconditional, Mapping):
        raise TypeError(
            "unconditional of the guidance must be a mapping or None; "
            f"got {received(unconditional)}"
        )
    if unconditional is None and batched and batched != "auto":
        raise ValueError("batched of the guidance needs unconditional, a mapping; got None")


def _takes(method: Callable[..., Any], count: int) -> bool:
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # not written in Python
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _of_these_outputs(guidance: Any) -> bool:
    """Whether ``mixture`` is said of the ``outputs`` that the object has, and not of a base's."""
    places = [vars(guidance) if hasattr(guidance, "__dict__") else {}]
    places += [vars(cls) for cls in type(guidance).__mro__]
    first = {
        name: next((i for i, place in enumerate(places) if name in place), len(places))
        for name in ("mixture", "outputs")
    }
    return first["mixture"] <= first["outputs"]


def _nothing(*_: Any) -> None:
    """In the place of a method that a guidance has not."""


class Steering:
    """A guidance with what it leaves out filled in; it is one itself.

    Args:
        guidance: checked by `check_guidance`.
        unconditional: to be used instead of the guidance's own.
    """

    def __init__(self, guidance: Guidance, unconditional: Mapping[str, Any] | None = None) -> None:
        check_guidance(guidance)
        self._guidance: Any = guidance
        self._replaced = unconditional

    @property
    def unconditional(self) -> Mapping[str, Any] | None:
        """What replaces entries of the condition; None where nothing does."""
        own: Mapping[str, Any] | None = getattr(self._guidance, "unconditional", None)
        return own if self._replaced is None else self._replaced

    @property
    def evaluations(self) -> int:
        """How often the model is evaluated in a guided step."""
        return int(self._guidance.evaluations)

    @property
    def uncapturable(self) -> str:
        """Why no step with it may be captured; empty where one may."""
        if not getattr(self._guidance, "capturable", True):
            return "the guidance asks for it (capturable=False)"
        return next(filter(None, map(refusal, self.modules())), "")

    def modules(self) -> list[nn.Module]:
        """Those that it evaluates beside the model: a classifier, or another network."""
        return modules_in((self._guidance, self.reads))

    @property
    def batched(self) -> bool:
        """Whether both halves have to go through the model in one call."""
        batched = getattr(self._guidance, "batched", False)
        return batched != "auto" and bool(batched)

    @property
    def mixture(self) -> bool:
        """Whether a guided step is what its row says of two outputs."""
        return getattr(self._guidance, "mixture", False) and _of_these_outputs(self._guidance)

    def held(self) -> list[Tensor]:
        """Tensors in its attributes, which ``outputs`` may write to."""
        kept = vars(self._guidance).values() if hasattr(self._guidance, "__dict__") else ()
        return [value for value in kept if type(value) is Tensor and not value.is_inference()]

    def check_table(self, table: Tensor, guided: list[bool], shifts_mean: bool) -> None:
        """Raise what the guidance raises where it does not fit the table."""
        getattr(self._guidance, "check_table", _nothing)(table, guided, shifts_mean)

    def check_steps(
        self, method: str, prediction_type: str, several: bool, differentiable: bool
    ) -> None:
        """Raise what the guidance raises where it does not fit the steps, or the model."""
        check = getattr(self._guidance, "check_steps", _nothing)
        check(method, prediction_type, several, differentiable)

    @property
    def measures(self) -> bool:
        """Whether it asks for a measurement."""
        return hasattr(self._guidance, "measured_shape")

    def measured_shape(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[int, ...] | None:
        """That of the measurement that has to be given; None where none is asked for."""
        asked = getattr(self._guidance, "measured_shape", None)
        return None if asked is None else tuple(asked(shape, dtype, device))

    @classmethod
    def of(cls, guidance: Guidance | None) -> Steering | None:
        """None for None; one that is complete stays itself."""
        return guidance if guidance is None or isinstance(guidance, cls) else cls(guidance)

    def is_of(self, guidance: object) -> bool:
        """Whether it completes this object."""
        return self._guidance is guidance

    def rows(self, timesteps: list[float]) -> tuple[list[float], list[bool]]:
        """(scale, guided or not) of the steps at these timesteps."""
        guided = [self.is_active(t) for t in timesteps]
        steps = zip(timesteps, guided, strict=True)
        return [self.scale_at(t) if active else 1.0 for t, active in steps], guided

    def scale_at(self, t: float) -> float:
        """The scale in force at timestep t."""
        scale_at = getattr(self._guidance, "scale_at", None)
        if scale_at is None:
            return 1.0
        return as_number(f"scale_at({t}) of the guidance", scale_at(t))

    def is_active(self, t: float) -> bool:
        """Whether the step at timestep t is guided at all."""
        is_active = getattr(self._guidance, "is_active", None)
        return True if is_active is None else bool(is_active(t))

    @property
    def reads(self) -> tuple[Any, ...]:
        """What a captured step decides from: the functions of a user's own, and what they read.

        Those of the classes of this package read nothing but their arguments and ``reads``.
        """
        guidance = self._guidance
        named = [
            name
            for cls in type(guidance).__mro__
            if is_a_users(cls)
            for name, member in vars(cls).items()
            if callable(member) and not name.startswith("__")
        ]
        functions = (getattr(guidance, name) for name in dict.fromkeys(named))
        return (*getattr(guidance, "reads", ()), *functions, guidance.outputs)

    @property
    def does(self) -> Any:
        """The function itself that gives the outputs; another object where it was exchanged."""
        return getattr(self._guidance.outputs, "__func__", self._guidance.outputs)

    def outputs(self, denoiser: Evaluation, x: Tensor, t: Tensor, condition: Condition) -> Outputs:
        """Those of the guidance; TypeError where they are no tensors."""
        made = self._guidance.outputs(denoiser, x, t, condition)
        if isinstance(made, Tensor):
            return Outputs(made)
        if not isinstance(made, Outputs) or not isinstance(made.model, Tensor):
            raise TypeError(
                "outputs of the guidance must return a tensor or Outputs; "
                f"got {type(made).__name__}"
            )
        shift = made.shift
        if shift is not None and not (isinstance(shift, Tensor) and shift.shape == x.shape):
            given = list(shift.shape) if isinstance(shift, Tensor) else type(shift).__name__
            raise TypeError(
                f"shift in the Outputs of the guidance must be a tensor like x, {list(x.shape)}; "
                f"got {given}"
            )
        return made

    def without_autograd(self) -> Steering:
        """One of the same operators that takes no gradient."""
        other = getattr(self._guidance, "without_autograd", None)
        # of a copy: what `outputs` keeps of a look at it is none of the user's
        guidance = copy.copy(self._guidance) if other is None else other()
        return Steering(guidance, self._replaced)
