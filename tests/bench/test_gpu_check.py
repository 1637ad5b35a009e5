"""The check of the CUDA path, where there is none: its frame, and its checks on a stand-in."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import signalled
from tests.children import runs

from stepfuse.bench.gpu_check import host, parent
from stepfuse.bench.gpu_check.__main__ import chosen
from stepfuse.bench.gpu_check.against import Poisoned, off
from stepfuse.bench.gpu_check.check import Context
from stepfuse.bench.gpu_check.child import plain
from stepfuse.bench.gpu_check.listing import CHECKS, Listed
from stepfuse.bench.gpu_check.parent import Run, exit_status
from stepfuse.bench.gpu_check.parts import each
from stepfuse.bench.gpu_check.report import markdown, table

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "src" / "stepfuse"
MACHINE = {"card": "a card", "driver": "1.2", "torch": "2.11", "python": "3.12", "date": "today"}
CORRECTNESS = [listed.name for listed in CHECKS if listed.group == "correctness"]
PRETENDED = {
    "fine": "context.note('answer', 42)",
    "wrong": "context.expect(False, 'two is three'); context.note('seen', [1, 2])",
    "raises": "context.note('seen', 1); raise ValueError('no such thing')",
    "aborts": "context.note('seen', 1); print('last words', file=sys.stderr); os.abort()",
    "exits": "context.note('seen', 1); os._exit(5)",
    "hangs": "context.note('seen', 1); context.note('child', start()); time.sleep(600)",
    "skips": "raise Skipped('needs a tool')",
}


def environment(*path: Path) -> dict[str, str]:
    """Of a process that finds the package, and our modules, in these folders."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Listed]:
    """Checks that end in every way there is."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, body in PRETENDED.items():
        limit = {"hangs": 4, "wrong": 1}.get(name, 30)
        source = f"""\
            import os, subprocess, sys, time
            from stepfuse.bench.gpu_check.check import Check, Skipped
            def start():
                words = ["python", "-c", "import time; time.sleep(600)"]
                return os.spawnv(os.P_NOWAIT, sys.executable, words)
            def run(context):
                {body}
            CHECK = Check({name!r}, "correctness", {limit}, run, "About {name}.")
        """
        lines = [line.removeprefix(" " * 12) for line in source.splitlines()]
        (folder / f"pretended_{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(parent, "PATIENCE", 1.0)
    for name, value in environment(folder, SOURCE.parent).items():
        monkeypatch.setenv(name, value)
    return {name: Listed(name, "correctness", f"pretended_{name}") for name in PRETENDED}


def run_one(listed: Listed, folder: Path) -> parent.Outcome:
    (outcome,) = Run(folder, MACHINE, stand_in=True).all([listed])
    return outcome


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("fine", "ok", ""),
        ("wrong", "wrong", ""),
        ("raises", "crashed", "ValueError: no such thing"),
        ("aborts", "crashed", "ended by SIGABRT"),
        ("exits", "crashed", "exit status 5"),
        ("skips", "skipped", "needs a tool"),
    ],
)
def test_how_a_check_ends_is_reported(
    pretended: dict[str, Listed], tmp_path: Path, name: str, status: str, reason: str
) -> None:
    outcome = run_one(pretended[name], tmp_path / "out")
    assert (outcome.status, outcome.reason) == (status, reason)
    assert exit_status([outcome]) == (status not in ("ok", "skipped"))
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert record["checks"][0]["status"] == status
    if name in ("raises", "aborts", "exits"):
        assert outcome.facts == {"seen": 1}
    if name == "aborts":
        assert "last words" in outcome.stderr
    if name == "wrong":
        assert outcome.wrong == ["two is three"]
        assert outcome.facts == {"seen": [1, 2]}


def test_a_check_that_hangs_is_killed_with_all_it_started(
    pretended: dict[str, Listed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "START_S", 12.0)
    outcome = run_one(pretended["hangs"], tmp_path / "out")
    assert outcome.status == "timeout"
    assert outcome.facts["seen"] == 1
    # where it stood, by the child itself
    assert any("pretended_hangs.py" in line for line in outcome.stderr), outcome.stderr
    assert not _runs_on(outcome.facts["child"])


ENDED = """
import signal, sys
from pathlib import Path
from stepfuse.bench.gpu_check.__main__ import _leave
from stepfuse.bench.gpu_check.listing import Listed
from stepfuse.bench.gpu_check.parent import Run
signal.signal(signal.SIGTERM, _leave)
Run(Path(sys.argv[1]), {"card": "a card"}).all([Listed("hangs", "speed", "pretended_hangs")])
"""


def test_a_parent_that_is_ended_takes_its_children_along(
    pretended: dict[str, Listed], tmp_path: Path
) -> None:
    """As where the machine is given back: nothing goes on computing."""
    run = signalled.start([sys.executable, "-c", ENDED, str(tmp_path)])
    notes = tmp_path / "work" / "hangs.json"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (notes.exists() and '"child"' in notes.read_text()):
        time.sleep(0.1)
    child = json.loads(notes.read_text())["facts"]["child"]
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 128 + signal.SIGTERM
    assert not _runs_on(child)


def _runs_on(pid: int) -> bool:
    """Whether a process is there once it had time to go."""
    for _ in range(50):
        if not runs(pid):
            return False
        time.sleep(0.1)
    return True


def test_the_budget_is_kept_and_named(pretended: dict[str, Listed], tmp_path: Path) -> None:
    """A check that may take 30 s and the start is left out, one that takes less is not."""
    run = Run(tmp_path, MACHINE, stand_in=True, budget_s=40.0)
    first, second = run.all([pretended["fine"], pretended["wrong"]])
    assert first.status == "skipped"
    assert first.reason.startswith("not started: of the budget of 40 s there are 40 s left")
    assert second.status == "wrong"
    assert run.record()["budget_s"] == 40.0


def test_every_check_leaves_a_line_and_a_record(
    pretended: dict[str, Listed], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(tmp_path, MACHINE, stand_in=True).all([pretended["fine"], pretended["wrong"]])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["status"]) for line in lines] == [
        ("fine", "ok"),
        ("wrong", "wrong"),
    ]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"gpu.json", "gpu.md"}
    text = (tmp_path / "gpu.md").read_text()
    for part in ("| card | a card |", "| fine | ok |", "## wrong: wrong", "- two is three"):
        assert part in text


def test_the_report_has_a_table_for_every_shape_of_fact() -> None:
    facts = {
        "speed": 12345.678,
        "names": ["a", "b"],
        "card": {"name": "x|y", "none": None},
        "rows": [{"at": 1, "error": 1e-7}, {"at": 2}],
        "ops": {"one": {"cases": 3}, "two": {"cases": 4}},
    }
    check = {
        "name": "c", "group": "speed", "about": "About.", "limit_s": 1, "status": "crashed",
        "reason": "ended by SIGSEGV", "seconds": 1.5, "facts": facts, "wrong": ["one", "two"],
        "stderr": ["deep", "down"],
    }  # fmt: skip
    record = {"machine": MACHINE, "stand_in": False, "seconds": 2.0, "checks": [check]}
    text = markdown(record)
    assert "| c | crashed | 1.5 | ended by SIGSEGV; one (and 1 more) |" in text
    assert "| speed | 1.235e+04 |\n| names | a, b |" in text
    assert "| name | x\\|y |\n| none | – |" in text
    assert "| at | error |\n| --- | --- |\n| 1 | 1e-07 |\n| 2 |  |" in text
    assert "|  | cases |\n| --- | --- |\n| one | 3 |\n| two | 4 |" in text
    assert "deep\ndown" in text
    assert table(("a",), []) == "| a |\n| --- |"


def test_facts_become_json() -> None:
    value = {1: (float("nan"), torch.float32), "b": [True, None, 2.5]}
    assert plain(value) == {"1": ["nan", "torch.float32"], "b": [True, None, 2.5]}


def test_a_part_that_raises_leaves_the_others() -> None:
    context = Context(torch.device("cpu"))

    def breaks() -> None:
        raise RuntimeError("broken\nin two lines")

    def sticks() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    each(context, {"breaks": breaks, "works": lambda: context.note("worked", True)})
    assert context.wrong == ["breaks: RuntimeError: broken"]
    assert context.facts["worked"] is True
    with pytest.raises(RuntimeError, match="illegal"):
        each(context, {"sticks": sticks})


def test_poison_and_allowance() -> None:
    out = Poisoned(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert "15 of 15 elements were not written" in out.problems("y")[0]
    out.tensor.fill_(1)
    assert out.problems("y") == []
    out.tensor.as_strided((1,), (1,), 64 + 15).fill_(0)
    assert out.problems("y") == ["y: memory around it was written"]
    exact = torch.ones(3, 5, dtype=torch.float64)
    assert off("y", out.tensor, exact * (1 + 2.0**-9), 0.0) == []
    (line,) = off("y", out.tensor, exact * 1.1, 1e-3)
    assert "15 of 15 elements are off" in line
    assert off("y", torch.tensor([float("nan")]), exact[0, :1], 1.0)


def test_checks_are_chosen_by_group_and_name() -> None:
    assert [listed.name for listed in chosen("correctness", [])] == CORRECTNESS
    assert [listed.name for listed in chosen(None, ["loop", "ops"])] == ["ops", "loop"]
    assert chosen("speed", ["ops"]) == []


def test_a_listed_check_says_what_the_list_says() -> None:
    for listed in CHECKS:
        check = listed.load()
        assert (check.name, check.group) == (listed.name, listed.group)


def test_a_check_without_a_module_is_skipped(tmp_path: Path) -> None:
    missing = Listed("later", "speed", CHECKS[0].module.replace(CHECKS[0].name, "later"))
    outcome = run_one(missing, tmp_path)
    assert (outcome.status, outcome.reason) == ("skipped", "not built")


def test_the_parent_names_no_cuda() -> None:
    """Neither it nor what it imports of these files does; importing the checks starts nothing."""
    for name in ("parent", "report", "listing", "__main__"):
        tree = ast.parse((ROOT / "bench" / "gpu_check" / f"{name}.py").read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "cuda" not in names, name
    for listed in CHECKS:
        listed.load()
    assert not torch.cuda.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stepfuse.bench.gpu_check", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, env=environment(SOURCE.parent),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("There is no CUDA on this machine (")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_machine_that_cannot_be_asked_has_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = host.ask(dict(os.environ), limit_s=0.01)
    assert hangs == {"card": None, "reason": "looking for a GPU took more than 0.01 s"}
    breaks = host.ask({"PYTHONPATH": "/nowhere", "PATH": os.environ["PATH"], "PYTHONHOME": "/no"})
    assert breaks["card"] is None
    assert breaks["reason"]


# what a machine that was lent with torch alone may lack
LACKING = ("PIL", "diffusers", "transformers", "matplotlib", "onnx", "openvino", "psutil", "scipy")


@pytest.fixture(scope="module")
def without_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree in which nobody built the C++ module, with few packages beside it."""
    package = tmp_path_factory.mktemp("tree") / "stepfuse"
    package.mkdir()
    for path in SOURCE.iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path.resolve())
    halted = f"import sys\nsys.modules.update(dict.fromkeys({LACKING!r}))\n"
    (package.parent / "sitecustomize.py").write_text(halted)
    return package.parent


@pytest.fixture(scope="module")
def stood_in(
    without_module: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The correctness half on the CPU, in a source tree without the C++ module."""
    folder = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "stepfuse.bench.gpu_check", "--stand-in"]
    done = subprocess.run(
        [*command, "--only", "correctness", "--out", str(folder)],
        capture_output=True, text=True, env=environment(without_module),
    )  # fmt: skip
    return done, folder


def test_every_check_runs_on_a_stand_in(stood_in: Any) -> None:
    done, folder = stood_in
    record = json.loads((folder / "gpu.json").read_text())
    assert [check["name"] for check in record["checks"]] == CORRECTNESS
    for check in record["checks"]:
        assert check["status"] in ("ok", "skipped"), check
        assert check["facts"] or check["reason"], check
    assert done.returncode == 0, done.stderr
    assert record["stand_in"] is True
    assert {path.name for path in folder.iterdir()} == {"gpu.json", "gpu.md", "work"}


@pytest.mark.parametrize("module", ["PIL", "stepfuse.kernels.cpp.module"])
def test_the_stand_in_had_little(without_module: Path, module: str) -> None:
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(without_module))
    last = done.stderr.splitlines()[-1]
    assert last.startswith(("ImportError", "ModuleNotFoundError")), done.stderr


def test_the_report_of_the_stand_in_says_so(stood_in: Any) -> None:
    _, folder = stood_in
    text = (folder / "gpu.md").read_text()
    assert "the CPU stood in for a GPU: nothing here is a result of one" in text
    for name in CORRECTNESS:
        assert f"## {name}: " in text
    assert max(map(len, text.splitlines())) < 1000
