"""Saving and resuming a training run. A state on disk is always a whole one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from stepfuse.engine.files import write_file


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read a state written for a run of the same identity (see ``TrainConfig.identity``).

    Raises:
        FileNotFoundError: nothing to resume from.
        ValueError: truncated or foreign file, or a state of a different run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume from: no such file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["identity"]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is truncated or no training state: {reason}") from None
    for name, value in identity.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} belongs to a run with another {name}: "
                f"{_short(saved.get(name))}, now {_short(value)}"
            )
    assert isinstance(state, dict)
    return state


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
