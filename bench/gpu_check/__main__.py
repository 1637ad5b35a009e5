"""``python -m stepfuse.bench.gpu_check --out FOLDER``: is the CUDA path right, and how fast is it?

Exit status: 0 where every check is ok or was skipped, 1 where something is wrong, 2 where there is
no CUDA or the command line is wrong.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import get_args

from stepfuse.bench.gpu_check import host
from stepfuse.bench.gpu_check.check import Group
from stepfuse.bench.gpu_check.listing import CHECKS, Listed
from stepfuse.bench.gpu_check.parent import Run, exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run the checks."""
    given = _parser().parse_args(arguments)
    machine = host.ask(dict(os.environ))
    if machine["card"] is None and not given.stand_in:
        print(
            f"There is no CUDA on this machine ({machine['reason']}); "
            "--stand-in exercises the checks' own code on the CPU.",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, _leave)
    run = Run(given.out, machine, given.stand_in, given.budget)
    return exit_status(run.all(chosen(given.only, given.check)))


def chosen(group: Group | None, names: Sequence[str]) -> list[Listed]:
    """The checks of a group (None: of both) with these names (none: all), in their order."""
    return [
        listed
        for listed in CHECKS
        if group in (None, listed.group) and (not names or listed.name in names)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stepfuse.bench.gpu_check",
        description="Checks of the CUDA path, each in a process of its own. FOLDER gets gpu.md to "
        "read and gpu.json with everything; its folder work may be dropped.",
    )
    names = [listed.name for listed in CHECKS]
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", choices=get_args(Group), help="one half of the checks")
    parser.add_argument(
        "--check", action="append", default=[], choices=names, metavar="NAME",
        help=f"only this one, may be repeated: {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument(
        "--stand-in", action="store_true", help="the CPU runs the checks, at small sizes"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no check that may end after it"
    )
    return parser


def _leave(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that the running child ends, too."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
