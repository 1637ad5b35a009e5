"""Shards made by Ray's actors: the same bytes, whatever is switched off meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.engine.generate import ray_machines
from tests.engine.generate.ray_case import REPOSITORY, Told, alone, hashes, job_of

import stepfuse
from stepfuse.engine.generate import create as creating
from stepfuse.engine.generate.engines import cluster
from stepfuse.engine.generate.job import Job
from stepfuse.engine.generate.machine import physical_cores
from stepfuse.engine.generate.outcome import COMPLETE, DISK, POISONED, PREEMPTED, USAGE, Outcome
from stepfuse.engine.generate.run import How, run
from stepfuse.engine.generate.stopping import Stop

TOKEN = "0123456789abcdef" * 4
ASKS_FOR_IT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
PATHS = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Two:
    """A cluster of two raylets with a core each, which this process belongs to."""

    address: str
    second: Any

    def lose(self) -> None:
        """The second one; as long as nobody waits for it, its workers believe it alive."""
        process = self.second.all_processes["raylet"][0].process
        process.kill()
        process.wait()


@pytest.fixture(scope="module", autouse=True)
def _asked_for_a_token() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ASKS_FOR_IT, **QUIET}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        with contextlib.suppress(ImportError):
            from ray._raylet import Config

            Config.initialize("")  # another test may have imported Ray, which reads them then
        yield


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    """This process belongs to it, and leaves it at the end."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ending = signal.getsignal(signal.SIGTERM)
    try:
        both = Cluster(initialize_head=True, head_node_args={"include_dashboard": False})
        second = both.add_node()
    finally:  # a node takes SIGTERM for itself, for good
        signal.signal(signal.SIGTERM, ending)
    with cluster.joined(both.address, cpus=0):
        yield Two(both.address, second)
    assert not ray.is_initialized()
    both.shutdown()
    assert signal.getsignal(signal.SIGTERM) == ending


def make(
    job: Job,
    address: str | None,
    told: Any = None,
    stop: Stop | None = None,
    workers: int | None = None,
) -> Outcome:
    """Run it."""
    how = How(engine="ray", address=address, grace=20, workers=workers)
    return run(job, how, told or Told(), stop or Stop())


def test_a_missing_ray_is_named_before_a_network_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(creating, "open_source", lambda name: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"pip install 'stepfuse\[ray\]'"):
        stepfuse.generate("digits", 10, tmp_path, engine="ray")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "127.0.0.1:many"])
def test_an_address_where_nobody_answers(address: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="cannot join the Ray cluster at --address " + address):
        stepfuse.generate("digits", 10, tmp_path, engine="ray", address=address)
    assert not list(tmp_path.iterdir())


def test_the_bytes_of_a_cluster_of_our_own_are_those_of_one_process(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    told = Told()
    job = job_of(tmp_path / "ray", "slow", 28)
    before = signal.getsignal(signal.SIGTERM)
    outcome = make(job, None, told)
    assert (outcome.status, outcome.made, outcome.left) == (COMPLETE, 4, 0)
    assert hashes(job) == alone(tmp_path / "one", "quick", 28)
    assert (told.begun.workers, told.images) == (physical_cores(), 28)
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before


def test_poison_is_tried_three_times_and_named(two: Two, tmp_path: Path) -> None:
    told = Told()
    job = job_of(tmp_path / "ray", "poisonous", 24, per_class=8)
    outcome = make(job, two.address, told)
    assert (outcome.status, outcome.made, outcome.left) == (POISONED, 1, 2)
    assert sorted(hashes(job)) == [0]
    failures = job.failures()
    assert sorted(failures) == sorted(outcome.failed) == [1, 2]
    assert all(told["attempts"] == 3 for told in failures.values())
    assert failures[1]["error"] == "ArithmeticError: poison"
    assert "poison" in failures[1]["traceback"]
    assert "the Ray actor was lost" in failures[2]["error"]
    assert [final for k, _, _, final in told.failures if k == 2] == [False, False, True]


def test_a_signal_lets_shards_be_finished(two: Two, tmp_path: Path) -> None:
    job = job_of(tmp_path / "ray", "slow", 160, shard=16)
    stop = Stop()
    told = Told(after=1, act=stop.ask)
    outcome = make(job, two.address, told, stop)
    assert outcome.status == PREEMPTED
    assert outcome.made == len(hashes(job)) == len(told.records) < 10
    assert told.images == 16 * outcome.made  # nothing that was begun is lost
    assert any("have 20 s to be finished" in note for note in told.notes)


def test_a_second_signal_drops_them(two: Two, tmp_path: Path) -> None:
    class Impatient(Told):
        since = 0.0

        def made(self, worker: int, images: int) -> None:
            self.since = self.since or time.monotonic()
            stop.ask()
            stop.ask()

    job = job_of(tmp_path / "ray", "slow", 2000, shard=1000)  # 100 s each
    stop, told = Stop(), Impatient()
    outcome = make(job, two.address, told, stop, workers=1)
    assert time.monotonic() - told.since < 8
    assert (outcome.status, outcome.made) == (PREEMPTED, 0)
    left = [path.name for path in (tmp_path / "ray" / "shards").iterdir()]
    assert left == []


def test_what_is_wrong_with_the_disk_ends_the_run(two: Two, tmp_path: Path) -> None:
    job = job_of(tmp_path / "ray", "full", 80)
    outcome = make(job, two.address, workers=1)
    assert (outcome.status, outcome.failed) == (DISK, {})
    assert outcome.reason == "somewhere: No space left on device"
    assert sys.modules["ray"].is_initialized()  # it had joined before, and is not thrown out


def test_an_actor_that_cannot_begin_says_why_and_where(two: Two, tmp_path: Path) -> None:
    job = job_of(tmp_path / "ray", "quick", 80)
    (tmp_path / "ray" / "plan.json").write_text("{}")
    outcome = make(job, two.address, workers=1)
    assert outcome.status == USAGE
    assert outcome.reason.startswith("on ")
    assert "plan.json is not the one" in outcome.reason


def test_no_machine_with_room_is_said_at_once(two: Two, tmp_path: Path) -> None:
    job = job_of(tmp_path / "ray", "quick", 80, threads=3)
    with pytest.raises(ValueError, match=r"no machine .* has 3 CPUs .* --workers N"):
        make(job, two.address)


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_MODE": "disabled"}],
    ids=["wrong token", "no token", "no authentication"],
)
def test_who_has_no_token_is_told_what_is_missing(
    two: Two, tmp_path: Path, environment: dict[str, str]
) -> None:
    variables = {**os.environ, "HOME": str(tmp_path), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    code = f"from {cluster.__name__} import joined\nwith joined({two.address!r}, 0): print('in')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: cannot join the Ray cluster at --address {two.address}: ")
    assert "the token here is missing or not that of the cluster" in last
    assert len(last) < 500


def test_a_raylet_is_killed_in_the_middle(two: Two, tmp_path: Path) -> None:
    class Unkind(Told):
        heard: ClassVar[set[int]] = set()

        def made(self, worker: int, images: int) -> None:
            if len(self.heard) < 2:
                self.heard.add(worker)
                if len(self.heard) == 2:  # both are in the middle of a shard
                    two.lose()

    told = Unkind()
    job = job_of(tmp_path / "ray", "slow", 96, shard=24)
    outcome = make(job, two.address, told)
    assert (outcome.status, outcome.left) == (COMPLETE, 0)
    assert hashes(job) == alone(tmp_path / "one", "quick", 96, 24)
    assert [text for _, _, text, _ in told.failures if "the Ray actor was lost" in text]
    assert max(record.attempt for record in job.records()) == 2
    assert not job.failures()


@pytest.mark.skipif(bool(reason := ray_machines.reason_against()), reason=reason)
def test_one_of_two_machines_is_switched_off(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    variables = {**os.environ, **QUIET, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": PATHS}
    folder = tmp_path / "ray"
    job = job_of(folder, "slow", 96, shard=48)
    with ray_machines.two_machines() as machines:
        address = ray_machines.start_ray(machines, variables)
        code = (
            "import stepfuse, sys\n"
            f"sys.exit(stepfuse.generate(out={str(folder)!r}, engine='ray', address={address!r})"
            ".status)"
        )
        child = subprocess.Popen(
            machines[0].command(sys.executable, "-c", code),
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while not machines[1].runs("make") and child.poll() is None:
                time.sleep(0.1)
            # of the seconds of a shard, which a worker that has lost its raylet must not finish
            time.sleep(0.5)
            os.kill(machines[1].raylet(), signal.SIGKILL)
            said, _ = child.communicate(timeout=100)
        finally:
            child.kill()
    assert child.returncode == COMPLETE, said
    assert hashes(job) == alone(tmp_path / "one", "quick", 96, 48)
    assert max(record.attempt for record in job.records()) == 2, said
