"""The folder of a training run: tried before the first step, so that no work is lost for it."""

from __future__ import annotations

from pathlib import Path

from stepfuse.engine.files import writing
from stepfuse.engine.files.reading import NOT_THERE, kind_of
from stepfuse.engine.training.config import TrainConfig
from stepfuse.engine.training.state import check_resumable

STATE, MODEL = "state.pt", "model.safetensors"


def check_place(config: TrainConfig) -> None:
    """What can be known of the folder before the data are read; nothing is made.

    Raises:
        FileNotFoundError: resuming, and there is no state.
        FileExistsError: not resuming, and there is one.
        OSError: the folder cannot be made or written to.
    """
    state = config.out / STATE
    if config.resume:
        check_resumable(state)
    elif kind_of(state) != NOT_THERE:
        raise FileExistsError(f"{config.out} holds a run already; resume it or take another folder")
    writing.check_place(config.out)


def prepare(out: Path, size: int) -> None:
    """Make the folder and try that a state of ``size`` bytes can be written into it.

    Raises OSError with the reason; a folder made for nothing is removed.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (STATE, MODEL):
            writing.check_file(out / name, size)
    except OSError:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()
        raise
