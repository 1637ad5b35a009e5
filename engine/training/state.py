"""Saving and resuming a training run. A state on disk is always a whole one."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stepfuse.engine.files.reading import NOT_THERE, kind_of, open_regular, reason
from stepfuse.engine.files.writing import write_file
from stepfuse.kernels.limits import check_memory

ACCEPTED = "the state.pt of a training run"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def check_resumable(path: Path) -> None:
    """Raise FileNotFoundError where there is nothing to resume from."""
    if kind_of(path) == NOT_THERE:
        raise FileNotFoundError(f"nothing to resume from: no such file {path}")


def load_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read a state written for a run of the same identity (see ``Run.identity``).

    Raises:
        FileNotFoundError: nothing to resume from.
        ValueError: truncated or foreign file, no file, or a state of a different run; then every
            difference is named.
    """
    check_resumable(path)
    with open_regular(path, ACCEPTED) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                check_memory(str(path), sum(member.file_size for member in archive.infolist()))
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
            saved = dict(state["identity"])
        except Exception as error:  # torch.load raises anything for a damaged file
            raise ValueError(f"{path} is truncated or no training state: {reason(error)}") from None
    different = list(_differences(saved, identity))
    if different:
        raise ValueError(
            f"{path} belongs to a run with another {'; another '.join(different)}: resume with "
            "what it had, or start a run of its own in another folder (out)"
        )
    assert isinstance(state, dict)
    return state


def _differences(
    saved: dict[str, Any], identity: dict[str, Any], prefix: str = ""
) -> Iterator[str]:
    """ "batch_size: 4, now 2" for every difference; what was not saved is not compared."""
    for name, value in identity.items():
        if name not in saved or saved[name] == value:
            continue
        old = saved[name]
        if isinstance(old, dict) and isinstance(value, dict):
            yield from _differences(old, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}: {_short(old)}, now {_short(value)}"


def _short(value: object) -> str:
    if isinstance(value, (list, tuple)):
        words = [f"{entry:.4g}" if isinstance(entry, float) else str(entry) for entry in value]
        if len(words) > 6:
            words = [*words[:3], "...", words[-1], f"({len(value)} in all)"]
        text = " ".join(words) or "none"
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
