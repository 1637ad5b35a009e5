"""Runs the checks one after the other, each in a child process, and keeps the record.

Nothing here touches CUDA: a GPU that is left in a bad state is left so for a child alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stepfuse.bench.gpu_check.check import Check
from stepfuse.bench.gpu_check.listing import Listed
from stepfuse.bench.gpu_check.report import markdown
from stepfuse.engine.files.writing import write_file

SCHEMA = "stepfuse-gpu-check-1"
WORK = "work"  # the folder of what the children leave, all of which gpu.json holds
START_S = 20.0  # for a child to import torch and to reach the GPU, beside the limit of its check
PATIENCE = 6.0  # times the limit where the CPU stands in
TAIL = 40  # lines of the standard error that are kept
_CHILD = "stepfuse.bench.gpu_check.child"


@dataclass
class Outcome:
    """How a check ended.

    Attributes:
        status: "ok", "wrong", "crashed", "timeout" or "skipped".
        reason: why it was skipped, crashed or killed.
        seconds: that its process took.
        facts, wrong: what it noted until it ended.
        stderr: the last lines of its standard error.
    """

    name: str
    group: str
    about: str
    limit_s: float
    status: str
    reason: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)


class Run:
    """A run of some checks into a folder.

    Args:
        folder: gets gpu.json and gpu.md, and the folder "work" that may be dropped afterwards.
        machine: what `host.ask` says, for the head of the report.
        stand_in: whether the CPU exercises the checks' own code.
        budget_s: a check that would not end within it, counted from here, is not started; None for
            no such bound.
    """

    def __init__(
        self,
        folder: Path,
        machine: dict[str, Any],
        stand_in: bool = False,
        budget_s: float | None = None,
    ) -> None:
        self.folder, self.work = folder, folder.resolve() / WORK
        self.machine, self.stand_in, self.budget_s = machine, stand_in, budget_s
        self.outcomes: list[Outcome] = []
        self._started = time.monotonic()
        self.work.mkdir(parents=True, exist_ok=True)

    def all(self, checks: Sequence[Listed]) -> list[Outcome]:
        """Run them; after each a line of JSON is printed and the record is written anew."""
        for listed in checks:
            check = listed.described()
            outcome = self._refused(check) or self._run(listed, check)
            self.outcomes.append(outcome)
            line = {k: v for k, v in asdict(outcome).items() if k not in ("about", "stderr")}
            print(json.dumps(line), flush=True)
            self.save()
        return self.outcomes

    def save(self) -> None:
        """Write gpu.json and gpu.md."""
        record = self.record()
        text = json.dumps(record, indent=1) + "\n"
        write_file(self.folder / "gpu.json", text.encode())
        write_file(self.folder / "gpu.md", markdown(record).encode())

    def record(self) -> dict[str, Any]:
        """Everything that is known, as JSON has it."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "stand_in": self.stand_in,
            "budget_s": self.budget_s,
            "seconds": round(time.monotonic() - self._started, 1),
            "checks": [asdict(outcome) for outcome in self.outcomes],
        }

    def _patience(self, check: Check) -> float:
        """Seconds until the child is killed."""
        return START_S + check.limit_s * (PATIENCE if self.stand_in else 1)

    def _refused(self, check: Check) -> Outcome | None:
        """The outcome of a check for which there is no time left; None where there is."""
        if self.budget_s is None:
            return None
        left = self.budget_s - (time.monotonic() - self._started)
        if self._patience(check) <= left:
            return None
        reason = (
            f"not started: of the budget of {self.budget_s:g} s there are {max(left, 0):.0f} s "
            f"left, and it may take {self._patience(check):.0f} s"
        )
        return _outcome(check, "skipped", reason)

    def _run(self, listed: Listed, check: Check) -> Outcome:
        notes = self.work / f"{listed.name}.json"
        notes.unlink(missing_ok=True)
        command = [sys.executable, "-m", _CHILD, listed.name, "--out", str(self.work)]
        command += ["--module", listed.module]
        command += ["--limit", str(self._patience(check) - START_S or START_S)]
        command += ["--stand-in"] if self.stand_in else []
        errors = self.work / f"{listed.name}.stderr"
        began = time.monotonic()
        with errors.open("wb") as stderr, errors.with_suffix(".stdout").open("wb") as stdout:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                env=environment(self.work),
            )
            try:
                code: int | None = child.wait(timeout=self._patience(check))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(child)
        seconds = round(time.monotonic() - began, 1)
        return self._concluded(check, code, seconds, _read(notes), _last_lines(errors))

    def _concluded(
        self, check: Check, code: int | None, seconds: float, state: dict[str, Any], tail: list[str]
    ) -> Outcome:
        status, reason = state.get("status", "running"), state.get("reason", "")
        if code is None:
            status, reason = "timeout", f"killed after {seconds:g} s"
        elif code < 0:
            status, reason = "crashed", f"ended by {signal.Signals(-code).name}"
        elif code > 0 and status != "crashed":
            status, reason = "crashed", f"exit status {code}"
        elif status == "running":
            status, reason = "crashed", "ended without a word"
        outcome = _outcome(check, status, reason)
        outcome.seconds, outcome.stderr = seconds, tail
        outcome.facts, outcome.wrong = state.get("facts", {}), state.get("wrong", [])
        return outcome


def environment(work: Path) -> dict[str, str]:
    """Of the children: they share what Triton and the compiler of torch make.

    In ``work``, unless the caller has folders for that.
    """
    return {
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 where every check is ok or was skipped, 1 otherwise."""
    return int(any(outcome.status not in ("ok", "skipped") for outcome in outcomes))


def _outcome(check: Check, status: str, reason: str) -> Outcome:
    return Outcome(check.name, check.group, check.about, check.limit_s, status, reason)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _read(notes: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state


def _last_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
