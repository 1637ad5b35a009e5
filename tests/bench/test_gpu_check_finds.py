"""The checks of the CUDA path find what is wrong, with a pretended GPU where they ask for one."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import stepfuse as sf
from stepfuse.bench.gpu_check import op_cases
from stepfuse.bench.gpu_check.check import Context, Skipped
from stepfuse.bench.gpu_check.checks import device, graphs, lint, memory, ops, sanitizer
from stepfuse.bench.gpu_check.digits import Digits
from stepfuse.bench.gpu_check.op_cases import Case, Place
from stepfuse.bench.gpu_check.refused import after_a_refusal
from stepfuse.kernels import torch_names

T = TypeVar("T")
CPU = torch.device("cpu")


class OnCuda(Context):
    """A context that takes the ways of a GPU, at the sizes of a stand-in."""

    @property
    def stands_in(self) -> bool:
        return False

    def sized(self, real: T, small: T) -> T:
        return small

    def synchronize(self) -> None:
        return


def named(cases: list[Case], op: str) -> list[Case]:
    return [case for case in cases if case.op == op]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(CPU)


def test_every_case_has_its_own_name() -> None:
    """The numbers of a case come from its name."""
    cases = [(case.op, case.name) for case in op_cases.cases()]
    assert len(set(cases)) == len(cases) > 150
    assert {op for op, _ in cases} == {"add_noise", "denoise_step", "group_norm_silu", "philox"}


@pytest.mark.parametrize("op", ["add_noise", "denoise_step", "group_norm_silu", "philox"])
def test_the_reference_passes(op: str) -> None:
    for case in named(op_cases.cases(), op)[::5]:
        assert case.run(Place(CPU, "reference")) == [], case.name


def test_a_kernel_that_misses_an_element_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def misses(*args: Any, **kwargs: Any) -> Tensor:
        y = sf_norm(*args, **kwargs)
        y.view(-1)[-1] = torch.nan
        return y

    sf_norm = op_cases.group_norm_silu
    monkeypatch.setattr(op_cases, "group_norm_silu", misses)
    case = named(op_cases.cases(), "group_norm_silu")[0]
    found = case.run(Place(CPU, "reference"))
    assert "1 of 3069 elements were not written" in found[0]
    context = Context(CPU)
    ops._run_op(context, Place(CPU, "reference"), "group_norm_silu", [case])
    assert context.facts["cases"] == {"group_norm_silu": {"cases": 1, "wrong": 1}}
    assert case.name in context.wrong[0]


def test_a_kernel_that_is_a_little_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = op_cases.add_noise

    def off(x0: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real(x0, *args, **kwargs)
        kwargs.get("out", x0).mul_(1 + 1e-4)
        return result

    monkeypatch.setattr(op_cases, "add_noise", off)
    case = named(op_cases.cases(), "add_noise")[0]
    (line,) = case.run(Place(CPU, "reference"))
    assert line.startswith("x_t: ")


def test_an_op_that_raises_is_one_wrong_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(place: Place) -> list[str]:
        raise RuntimeError("no such instruction")

    def dies(place: Place) -> list[str]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    context = Context(CPU)
    fine = Case("op", "fine", lambda place: [])
    ops._run_op(context, Place(CPU, "auto"), "op", [Case("op", "breaks", breaks), fine])
    assert context.wrong == ["op breaks: RuntimeError: no such instruction"]
    assert context.facts["cases"] == {"op": {"cases": 2, "wrong": 1}}
    with pytest.raises(RuntimeError, match="illegal"):
        ops._run_op(context, Place(CPU, "auto"), "op", [Case("op", "dies", dies)])
    assert context.facts["running"] == "op dies"


def test_a_replay_that_differs_is_found(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    real = Digits.draw

    def drawn(self: Digits, sampler: sf.Sampler, count: int, **call: Any) -> Tensor:
        images = real(self, sampler, count, **call)
        return images if sampler.graph is None else images + 1e-6

    monkeypatch.setattr(Digits, "draw", drawn)
    monkeypatch.setattr(graphs, "SETTINGS", graphs.SETTINGS[:1])
    context = Context(CPU)
    graphs._replays(context, digits)
    assert len(context.wrong) == 2
    assert "graph='loop': differs from eager by up to" in context.wrong[1]


def test_a_step_that_was_not_captured_is_found(
    monkeypatch: pytest.MonkeyPatch, digits: Digits
) -> None:
    monkeypatch.setattr(sf.Sampler, "stats", lambda self: {"eager_steps": 3, "replays": 0})
    context = Context(CPU)
    graphs._captured(context, "a name", digits.sampler())
    (line,) = context.wrong
    assert line.startswith("a name: not captured (capture ")


def test_a_capture_after_a_refusal_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, digits: Digits
) -> None:
    """On the CPU nothing refuses a model that waits for the device: that is found, too."""
    streams = SimpleNamespace(
        empty_cache=lambda: None, default_stream=lambda at: 1, current_stream=lambda at: 2
    )
    for name, value in vars(streams).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(OnCuda, "sized", lambda self, real, small: real)
    context = OnCuda(CPU)
    after_a_refusal(context, digits)
    assert context.wrong == [
        "ReadsOnHost: the stream was not restored",
        "Waits: its step was captured all the same",
        "Waits: the stream was not restored",
    ]
    assert [row["captured afterwards"] for row in context.facts["refusals"]] == [True, True]


@pytest.mark.parametrize(("step", "wrong"), [(0, 0), (1 << 20, 1)])
def test_memory_that_grows_is_found(
    monkeypatch: pytest.MonkeyPatch, digits: Digits, step: int, wrong: int
) -> None:
    allocated, reserved = itertools.count(10 << 20, step), itertools.count(50 << 20, 0)
    for name, value in {
        "memory_allocated": lambda at: next(allocated),
        "memory_reserved": lambda at: next(reserved),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch_names, "clear_cublas_workspaces", lambda: None)
    monkeypatch.setattr(memory, "EVERY", 1)
    context = OnCuda(CPU)
    memory._turns(context, digits, "a name", 4, False)
    assert len(context.wrong) == wrong, context.wrong
    assert [row["batch"] for row in context.facts["bytes, a name"]] == [1, 2, 3, 4] * 2
    assert set(context.facts["bytes left, a name"]) == {
        "without the workspaces of cuBLAS", "after empty_cache()",
        "after reset() and empty_cache()",
    }  # fmt: skip


def test_a_lint_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint, "check_capturable", lambda sampler, shape: None)
    context, rows = Context(CPU), []
    lint._compare(context, rows, "item()", lint.REFUSED["item()"])
    assert context.wrong[0] == "item(): the lint says 'nothing'"
    assert context.wrong[1].startswith("item(): the lint allows it; the sampler: capture ")
    assert rows[0]["lint"] == "allows it"


SANITIZER = """#!{python}
import sys
print("========= COMPUTE-SANITIZER")
print("========= ERROR SUMMARY: {errors} errors")
sys.exit({status})
"""


@pytest.mark.parametrize(("errors", "status"), [(0, 0), (3, sanitizer.FOUND), (0, 1)])
def test_what_the_sanitizer_finds_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, errors: int, status: int
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(python=sys.executable, errors=errors, status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    context = OnCuda(CPU)
    sanitizer.run(context)
    said = {"status": status, "said": f"ERROR SUMMARY: {errors} errors"}
    assert context.facts["memcheck denoise_step"] == said
    assert len(context.wrong) == (4 if status else 0)
    if status:
        what = "found something" if status == sanitizer.FOUND else "failed"
        assert context.wrong[0] == (
            f"memcheck group_norm_silu: {what}: ERROR SUMMARY: {errors} errors"
        )


def test_without_a_sanitizer_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    with pytest.raises(Skipped, match="not installed"):
        sanitizer.run(OnCuda(CPU))


def test_a_sanitizer_among_the_wheels_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia" / "cuda_sanitizer_api" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sanitizer, "_FOLDERS", ())
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert sanitizer.find() == str(program)


def test_the_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="A card", major=9, minor=0, multi_processor_count=132, L2_cache_size=60_000_000
    )
    for name, value in {
        "get_device_properties": lambda at: properties,
        "mem_get_info": lambda at: (100e9, 140e9),
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "device_count": lambda: 1,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(device, "why_not", lambda *a: "no compiler" if a[2] is torch.half else "")
    context = OnCuda(CPU)
    device._facts(context)
    assert context.facts["card"]["L2 MB"] == 60.0
    assert context.facts["card"]["torch has code for"] == "sm_80 sm_90"
    assert context.wrong == ["Triton cannot run torch.float16: no compiler"]


def test_the_clocks_are_asked_for_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the fields that a driver does not know, where it refuses all of them."""
    asked: list[str] = []

    def query(fields: str) -> str | None:
        asked.append(fields)
        return None if "mig" in fields else "345 MHz, 3201 MHz, 1980 MHz, 3201 MHz"

    monkeypatch.setattr(device.host, "query", query)
    context = Context(CPU)
    device._clocks(context)
    assert context.facts["clocks"]["clocks.max.sm"] == "1980 MHz"
    assert asked[1] == "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"


def test_tensors_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at: (10e9, 140e9))
    context = OnCuda(CPU)
    assert not ops._fits(context, "a large one", 9_000_000_000)
    assert context.facts["a large one"] == "left out: needs 9 GB, 10 GB are free"
    assert ops._fits(context, "another", 8_000_000_000)
