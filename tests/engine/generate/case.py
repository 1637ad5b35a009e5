"""Jobs for tests, and short ways to run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import signalled

from stepfuse.engine.generate.create import create
from stepfuse.engine.generate.job import Job, open_job
from stepfuse.engine.generate.place import open_place
from stepfuse.engine.generate.recipe import Recipe
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.work import run_shard, todo

ROOT = Path(__file__).parents[3]
MODELS = "tests.engine.generate.models"
STEPS = "2"


def settings(model: str = f"{MODELS}:plain", **options: Any) -> Settings:
    """A job's, with nothing left open, so that no trial is needed."""
    recipe = options.pop("recipe", Recipe(steps=STEPS))
    chosen: dict[str, Any] = {
        "batch_size": 4, "shard_size": 8, "threads": 1, "format": "webdataset", "device": "cpu",
    }  # fmt: skip
    return Settings(model=model, recipe=recipe, **{**chosen, **options})


def new_job(folder: Path, n: int = 21, **options: Any) -> Job:
    """A job in a folder that is not there yet; of three shards, the last one of five images."""
    return create(settings(**options), n, open_place(folder)).job


def make_all(job: Job) -> dict[str, str]:
    """Every shard, here, one after the other; their hashes."""
    for k in todo(job):
        run_shard(job, k)
    return hashes(job)


def hashes(job: Job) -> dict[str, str]:
    """Of the shards, by their names, as the records say."""
    return {job.shard_name(r.shard): r.sha256 for r in job.records()}


def hidden(folder: Path) -> list[str]:
    """Temporary names and claims that are left in a job's folder."""
    claims = folder / "claims"
    return [str(p) for p in folder.rglob(".*")] + [str(p) for p in claims.glob("*")]


def command(*words: str) -> list[str]:
    """`stepfuse generate` with these words."""
    return [sys.executable, "-m", "stepfuse", "generate", *words]


def options_of(model: str, n: int, out: Path, *more: str) -> list[str]:
    """The words for a job like `settings`."""
    return [
        "--model", model if ":" in model or "/" in model else f"{MODELS}:{model}", "-n", str(n),
        "--out", str(out), "--steps", STEPS, "--batch-size", "4", "--shard-size", "8",
        "--threads", "1", "--format", "webdataset", "--device", "cpu", *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Variables under which a process finds the tests."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "OMP_NUM_THREADS": "1"}  # fmt: skip


def start(*words: str) -> subprocess.Popen[str]:
    """`stepfuse generate` as a process of its own, in a session of its own."""
    return signalled.start(
        command(*words),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ran(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The same, run to its end."""
    return subprocess.run(
        command(*words),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def reopened(folder: Path) -> Job:
    """The job as another process sees it."""
    return open_job(folder)
