"""The clock, the graphs, the children and the counters of the speed checks, on what stands in."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfuse.bench.gpu_check import capped, counted
from stepfuse.bench.gpu_check.check import Context, Skipped
from stepfuse.bench.gpu_check.checks import counters
from stepfuse.bench.gpu_check.timing import (
    Clock,
    Times,
    captured,
    ratio,
    relative_error,
    tf32_flags,
)
from stepfuse.bench.tf32 import tf32
from stepfuse.kernels import torch_names

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_one_that_raises_leaves_the_others_to_be_timed() -> None:
    calls = Clock(Context(CPU))
    ran: list[str] = []

    def breaks() -> None:
        if ran.count("good") > 2:
            raise RuntimeError("lost\nmore")

    found = calls.alternate({"good": lambda: ran.append("good"), "bad": breaks}, 6)
    assert (len(found["good"].device), len(found["good"].wall)) == (6, 6)
    assert len(found["bad"].device) < 6
    assert found["bad"].failed == "RuntimeError: lost"
    assert found["good"].milliseconds()["rounds"] == 6


def test_a_ratio_is_of_pairs() -> None:
    slow, fast = Times(device=[2.0, 60.0, 3.0]), Times(device=[1.0, 20.0, 1.0])
    assert ratio(slow, fast) == 3.0
    assert ratio(slow, fast, "wall") is None
    assert Times(device=[0.002, 0.004]).milliseconds(2) == {"rounds": 2, "device_ms": 1.5}


def test_an_error_with_nan_is_no_small_one() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([3.0, torch.nan]), exact) <= 1e9


def test_tf32_is_set_inside_only() -> None:
    before = tf32_flags()
    for on in (True, False):
        with tf32(on):
            assert tf32_flags() == {"matmul": on, "cudnn": on}
        assert tf32_flags() == before


class Device:
    """Stands in for ``torch.cuda``: a current stream, and one allocator that captures may hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = "default"
        self.log: list[str] = []
        self.mode = 0
        self.pools: set[Any] = set()
        device = self

        class Stream:
            def __init__(self, of: Any) -> None:
                self.of = of

            def wait_stream(self, other: Any) -> None:
                device.log.append("wait")

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert isinstance(device.stream, Stream), "capture on the default stream"
                assert capture_error_mode == "thread_local"
                device.pools.add(pool)
                device.log.append("begin")

            def capture_end(self) -> None:
                device.log.append("end")
                if "broken" in device.log:
                    raise RuntimeError("capture was invalidated")
                device.pools.clear()

            def replay(self) -> None:
                device.log.append("replay")

        @contextlib.contextmanager
        def stream(chosen: Any) -> Iterator[None]:
            before, device.stream = device.stream, chosen
            try:
                yield
            finally:
                device.stream = before

        default = Stream(None)
        patches: dict[str, Any] = {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": stream,
            "device": lambda chosen: contextlib.nullcontext(),
            "current_stream": lambda: default,
            "current_device": lambda: 0,
            "synchronize": lambda chosen=None: device.log.append("synchronize"),
            "empty_cache": lambda: device.log.append("empty_cache"),
            "graph_pool_handle": lambda: (0, 1),
            "get_sync_debug_mode": lambda: device.mode,
            "set_sync_debug_mode": self._set,
        }
        for name, value in patches.items():
            monkeypatch.setattr(torch.cuda, name, value)
        give_back: Callable[[int, Any], None] = lambda index, pool: self.pools.discard(pool)  # noqa: E731
        monkeypatch.setattr(torch_names, "end_allocate_to_pool", give_back)
        monkeypatch.setattr(torch_names, "release_pool", give_back)

    def _set(self, mode: Any) -> None:
        self.mode = mode


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_a_call_is_warmed_up_captured_and_replayed(device: Device) -> None:
    modes: list[Any] = []

    def run() -> None:
        modes.append(device.mode)
        device.log.append("run")

    replay = captured(Context(CUDA), run, warm_up=3)
    # waits are errors in the last warm-up, before the capture begins
    assert modes == [0, 0, "error", 0]
    assert device.log[-4:] == ["begin", "run", "end", "wait"]
    replay()
    assert device.log[-1] == "replay"
    assert device.stream == "default"


def test_a_capture_that_fails_leaves_stream_and_pool_as_they_were(device: Device) -> None:
    def run() -> None:
        if "begin" in device.log:
            device.log.append("broken")
            raise ValueError("not while capturing")

    with pytest.raises(RuntimeError, match="invalidated") as raised:
        captured(Context(CUDA), run)
    assert isinstance(raised.value.__context__, ValueError)
    assert (device.stream, device.pools, device.mode) == ("default", set(), 0)


def test_what_waits_for_the_device_is_not_captured(device: Device) -> None:
    def run() -> None:
        if device.mode == "error":
            raise RuntimeError("called a synchronizing operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        captured(Context(CUDA), run)
    assert "begin" not in device.log
    assert (device.stream, device.mode) == ("default", 0)


SLOW = """
import json, subprocess, sys, time
from stepfuse.bench.gpu_check import capped
job = json.loads(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
capped.answer(job["path"], {"pid": child.pid}, ["so far"])
print("waiting", flush=True)
time.sleep(60)
"""


def test_a_child_past_its_time_is_killed_with_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_child.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    started = time.monotonic()
    found = capped.ask("slow_child", {}, 10.0)
    assert time.monotonic() - started < 40
    assert (found["ended"], found["wrong"]) == ("killed after 10 s", ["so far"])
    assert found["last_lines"] == ["waiting"]
    assert ends(found["facts"]["pid"])


def ends(pid: int) -> bool:
    """Whether a process is gone soon, or done and waited for by nobody."""
    status = Path("/proc", str(pid), "status")
    for _ in range(100):
        with contextlib.suppress(OSError):  # it may go while it is read
            if status.exists() and "State:\tZ" not in status.read_text():
                time.sleep(0.1)
                continue
        return True
    return False


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Although it has a process group of its own."""
    path = tmp_path / "pid"
    sleeper = f"import os, pathlib, time; pathlib.Path({str(path)!r}).write_text(str(os.getpid()))"
    command = [sys.executable, "-c", f"{sleeper}; time.sleep(60)"]
    code = f"from stepfuse.bench.gpu_check import capped; capped.run({command!r}, 60.0)"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        for _ in range(300):
            if path.exists() and path.read_text():
                break
            time.sleep(0.1)
        parent.kill()
    assert ends(int(path.read_text()))


def test_a_child_that_fails_says_why() -> None:
    found = capped.ask("no_such_module", {}, 60.0)
    assert found["ended"] == "exit status 1"
    assert "no_such_module" in found["last_lines"][-1]
    assert found["facts"] == {}


HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def table(*kernels: str) -> str:
    """What Nsight Compute prints for launches of these kernels, each with three metrics."""
    lines = ["==PROF== Connected to process 7", "a line of the program", HEADER]
    for number, kernel in enumerate(kernels):
        start = f'"{number}","7","python","127.0.0.1","{kernel}","1","7","(128, 1, 1)"'
        start += ',"(64, 1, 1)","0","9.0","Command line profiler metrics"'
        for metric, unit, value in (
            ("gpu__time_duration.sum", "us", "12.5"),
            ("launch__registers_per_thread", "register/thread", "1,024"),
            ("lts__t_sector_hit_rate.pct", "%", "(!) n/a"),
        ):
            lines.append(f'{start},"{metric}","{unit}","{value}"')
    return "\n".join([*lines, "==PROF== Disconnected from process 7"])


def test_the_table_of_counters_is_read() -> None:
    rows = counters.parsed(table("_apply", "_kernel"))
    assert [row["kernel"] for row in rows] == ["_apply", "_kernel"]
    assert rows[0] == {
        "kernel": "_apply",
        "grid": "(64, 1, 1)",
        "block": "(128, 1, 1)",
        "ns": 12500.0,
        "registers": 1024.0,
        "l2_hit_percent": "(!) n/a",
    }
    assert counters.parsed("==ERROR== no kernels were profiled") == []


def test_rows_are_labelled_where_the_kernels_are_those_expected() -> None:
    names = [kernel for _, kernels in counted.cases(torch.device("meta")) for kernel in kernels]
    assert set(names) == set(counted.KERNELS)
    found = counters.labelled(counters.parsed(table(*names)))
    assert found[0]["case"] == found[1]["case"] == "group_norm_silu NHWC 2x320x64x64 fp16"
    assert found[-1]["case"].startswith("denoise_step ddim")
    assert "case" not in counters.labelled(counters.parsed(table(*names[1:])))[0]


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, the only one on the PATH."""
    path = tmp_path / "ncu"
    monkeypatch.setenv("PATH", str(tmp_path))
    return path


def write(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_counters(ncu: Path) -> None:
    names = [kernel for _, kernels in counted.cases(torch.device("meta")) for kernel in kernels]
    (ncu.parent / "table").write_text(table(*names))
    write(ncu, f"while read -r line; do echo \"$line\"; done < '{ncu.parent / 'table'}'")
    context = Context(CUDA)
    counters.CHECK.run(context)
    assert context.wrong == []
    assert [row["kernel"] for row in context.facts["kernels"]] == names
    assert "--clock-control=none" in context.facts["command"]


def test_counters_that_count_nothing_are_wrong(ncu: Path) -> None:
    write(ncu, "echo '==ERROR== an error'; exit 3")
    context = Context(CUDA)
    counters.CHECK.run(context)
    assert "exit status 3" in context.wrong[0]
    assert context.facts == {"last_lines": ["==ERROR== an error"]}


def test_counters_are_skipped_with_a_reason(ncu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Skipped, match="there is none here"):
        counters.CHECK.run(Context(CPU))
    write(ncu, "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1")
    with pytest.raises(Skipped, match="may not read"):
        counters.CHECK.run(Context(CUDA))
    ncu.unlink()
    monkeypatch.setattr(counters, "find", lambda: None)
    with pytest.raises(Skipped, match="needs Nsight Compute"):
        counters.CHECK.run(Context(CUDA))


def test_the_newest_is_found(ncu: Path, tmp_path: Path) -> None:
    pattern = f"{tmp_path}/*/ncu"
    assert counters.find(places=[pattern]) is None
    for version in ("2024.3.1", "2025.1.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch()
    assert counters.find(places=[pattern]) == f"{tmp_path}/2025.1.0/ncu"
    write(ncu, "")
    assert counters.find(places=[pattern]) == str(ncu)
