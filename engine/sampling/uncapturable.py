"""Models that say of themselves that no step with them may be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from stepfuse.engine.compile.state.reach import Reach
from stepfuse.kernels.checks import check_flag, received


def refusal(model: nn.Module | Callable[..., Any] | None) -> str:
    """Why a step with the model must not be captured; empty where it may be.

    It has the attribute ``capturable`` and it is False, or a module does that it holds or, where it
    is a function, that it names. ``uncapturable_because`` beside it is the reason.
    """
    for found in _parts(model):
        if not getattr(found, "capturable", True):
            because = getattr(found, "uncapturable_because", "")
            said = f"{type(found).__name__} asks for it (capturable=False)"
            return f"{said}: {because}" if because else said
    return ""


def check_refusal(model: nn.Module | Callable[..., Any]) -> None:
    """Raise TypeError where the model, or one of its modules, says it in another type."""
    for found in _parts(model):
        check_flag("capturable of the model", getattr(found, "capturable", True))
        because = getattr(found, "uncapturable_because", "")
        if not isinstance(because, str):
            raise TypeError(
                f"uncapturable_because of the model must be a text; got {received(because)}"
            )


def modules_in(roots: Iterable[Any]) -> list[nn.Module]:
    """The modules that hang on some objects, or that the code of functions names."""
    reach = Reach({str(number): root for number, root in enumerate(roots)})
    return list(dict.fromkeys(module for _, module in reach.modules))


def _parts(model: Any) -> list[Any]:
    if isinstance(model, nn.Module):
        return list(model.modules())
    return [model, *modules_in((model,))]
