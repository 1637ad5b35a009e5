"""A process that makes shards, encodes images or tries out a batch size, for one that asks it to.

Started as ``python -m stepfuse.engine.generate.child FD`` with one end of a pipe, and not by
``multiprocessing``: that would run the user's main script again in every child. A child hears only
its parent: Ctrl-C and SIGTERM are the parent's to act upon. It ends when the parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from stepfuse.engine.generate.failures import describe, kind
from stepfuse.engine.generate.order import DROP, Order

_PARENT_DEATH = 1  # PR_SET_PDEATHSIG


class Dropped(BaseException):
    """The parent wants nothing more, at once."""


def main(descriptor: int, parent: int) -> int:
    """The life of a child."""
    _deafen()
    _die_with(parent)
    pipe = Connection(descriptor)
    with contextlib.suppress(Dropped, EOFError, BrokenPipeError, ConnectionResetError):
        order: Order = pipe.recv()
        sys.path[:] = order.paths
        if order.cpus and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):  # it was taken from us meanwhile
                os.sched_setaffinity(0, order.cpus)
        if order.task == "encode":
            _encode(pipe, order)
            return 0
        try:
            import torch

            torch.set_num_threads(order.threads)
            task = _shards if order.task == "shards" else _trial
        except Exception as error:
            pipe.send(("broken", kind(error), describe(error), traceback.format_exc()))
            return 1
        task(pipe, order)
        signal.signal(DROP, signal.SIG_IGN)  # it is ending already
    return 0


def _shards(pipe: Connection, order: Order) -> None:
    """Load the network, say so, and make what is asked for until nobody asks."""
    from stepfuse.engine.generate.making import Maker

    maker = Maker(device=order.device, **order.arguments)
    answer = maker.load()
    pipe.send(answer)
    while answer[0] != "broken":
        k, attempt = pipe.recv()
        answer = maker.make(k, attempt, lambda count: pipe.send(("made", count)))
        pipe.send(answer)


def _encode(pipe: Connection, order: Order) -> None:
    """Encode images in chunks until no more come; an error is an answer, too."""
    format = order.arguments["format"]
    while True:
        images = pipe.recv()
        answer: tuple[str, Any]
        try:
            answer = ("encoded", [format.encode(image) for image in images])
        except Exception as error:
            answer = ("raised", error)
        pipe.send(answer)


def _trial(pipe: Connection, order: Order) -> None:
    from stepfuse.engine.generate.settings import Settings
    from stepfuse.engine.generate.trial import measure

    asked = order.arguments
    try:
        found = measure(
            Settings.from_json(asked["settings"]),
            asked["n"],
            order.device,
            asked["memory"],
            asked["depth"],
            tell=lambda tried: pipe.send(("tried", tried)),
        )
    except Exception as error:
        pipe.send(("broken", kind(error), describe(error), traceback.format_exc()))
    else:
        pipe.send(("found", found))


def _deafen() -> None:
    """Hear nothing but `DROP`."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name) and getattr(signal, name) != DROP:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(DROP, _drop)


def _drop(number: int, frame: FrameType | None) -> None:
    signal.signal(DROP, signal.SIG_IGN)  # what is being removed is removed
    raise Dropped


def _die_with(parent: int) -> None:
    """Be dropped when the parent is gone, also killed; on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH, int(DROP))
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
