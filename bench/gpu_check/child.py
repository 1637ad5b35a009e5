"""One check in a process of its own.

    python -m stepfuse.bench.gpu_check.child NAME --out FOLDER

What is known so far lies in FOLDER/NAME.json at any moment, so that whoever waits for this process
loses nothing when it dies. Where a check takes too long, the lines on which its threads stand are
on the standard error before it is killed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepfuse.bench.gpu_check.check import Context, Skipped
from stepfuse.bench.gpu_check.listing import CHECKS, Listed

_BEFORE_THE_END = 3.0  # seconds before the limit, when the stacks are written


class Notes:
    """The file of one check, replaced at every note."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def write(self, context: Context, status: str = "running", reason: str = "") -> None:
        """Facts and mistakes so far, and how it ended."""
        state = {
            "status": status,
            "reason": reason,
            "facts": plain(context.facts),
            "wrong": list(context.wrong),
        }
        temporary = self._path.with_suffix(".tmp")
        with self._lock:
            temporary.write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
            os.replace(temporary, self._path)


def plain(value: Any) -> Any:
    """A fact in JSON's types: what has none becomes text, as do infinity and NaN."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def run(listed: Listed, folder: Path, device: torch.device, limit_s: float) -> int:
    """Run a check and leave what it found in ``folder``; the exit status of this process."""
    notes = Notes(folder / f"{listed.name}.json")
    context = Context(device, limit_s, changed=notes.write)
    notes.write(context)
    try:
        listed.load().run(context)
        context.synchronize()
    except Skipped as reason:
        notes.write(context, "wrong" if context.wrong else "skipped", str(reason))
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        notes.write(context, "crashed", f"{type(error).__name__}: {first}")
        return 1
    else:
        notes.write(context, "wrong" if context.wrong else "ok")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run the check that it names."""
    parser = argparse.ArgumentParser(prog="stepfuse.bench.gpu_check.child", description=__doc__)
    parser.add_argument("name", help="of the check")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.json")
    parser.add_argument("--stand-in", action="store_true", help="on the CPU, at small sizes")
    parser.add_argument("--module", help="that has the CHECK, for one that is not listed")
    parser.add_argument("--limit", type=float, help="seconds; that of the check by default")
    given = parser.parse_args(arguments)
    known = {listed.name: listed for listed in CHECKS}
    if given.module:
        listed = Listed(given.name, "correctness", given.module)
    elif given.name in known:
        listed = known[given.name]
    else:
        parser.error(f"name must be one of {', '.join(known)}; got {given.name!r}")
    limit_s = given.limit or listed.described().limit_s or 60.0
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(limit_s - _BEFORE_THE_END, limit_s / 2), exit=False)
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu") if given.stand_in else torch.device("cuda", 0)
    return run(listed, given.out, device, limit_s)


if __name__ == "__main__":
    sys.exit(main())
