"""Triton's kernels, compiled by several processes for all checks that follow."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

import torch

from stepfuse.bench.gpu_check.check import Check, Context
from stepfuse.bench.gpu_check.digits import Digits, comparable, guidance
from stepfuse.bench.gpu_check.op_cases import Place, cases
from stepfuse.bench.gpu_check.parts import in_a_line
from stepfuse.engine.generate.machine import usable_cores

STAND_IN = 40  # of so many cases, one is run where the CPU stands in
MOST = 14  # processes: each has a context of its own on the GPU
# images at a time and ``optimize`` of a sampler, as the checks that follow have them
DIGITS: tuple[tuple[int, bool | torch.dtype], ...] = (
    (1, False),
    (8, False),
    (64, False),
    (2, True),
    (8, True),
    (64, torch.bfloat16),
)


def run(context: Context) -> None:
    """Deal the cases of the ops out to processes, each of which runs its own."""
    place = Place(context.device, context.sized("triton", "auto"))
    workers = min(max(usable_cores() - 1, 1), context.sized(MOST, 1))
    began = time.perf_counter()
    failed: list[str] = []
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawning) as pool:
        jobs: list[Future[list[str]]] = [
            pool.submit(use_digits, context.device, count, optimize)
            for count, optimize in context.sized(DIGITS, DIGITS[:1])
        ]
        jobs += [
            pool.submit(use_cases, place, at, workers, context.sized(1, STAND_IN))
            for at in range(workers)
        ]
        for job in as_completed(jobs):
            try:
                failed += job.result()
            except Exception as error:
                failed.append(in_a_line(error))
            context.note("seconds", round(time.perf_counter() - began, 1))
    context.note("processes", workers)
    context.note("what could not be compiled or run", failed)


def use_cases(place: Place, at: int, workers: int, stride: int) -> list[str]:
    """In a process: run every ``workers``-th case; what they raise, a line each."""
    failed = []
    for case in cases()[::stride][at::workers]:
        try:
            case.run(place)
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{case.op} {case.name}: {in_a_line(error)}")
    return failed


def use_digits(device: torch.device, count: int, optimize: bool | torch.dtype) -> list[str]:
    """In a process: a guided step of so many digits, of the network as it is or optimised."""
    try:
        comparable()
        digits = Digits(device)
        settings = {"eta": 0.5, "guidance": guidance(), "optimize": optimize}
        digits.draw(digits.sampler(steps=1, graph=None, **settings), count)
    except Exception as error:
        traceback.print_exc()
        return [f"{count} digits, optimize={optimize}: {in_a_line(error)}"]
    return []


CHECK = Check(
    "compile",
    "correctness",
    60.0,
    run,
    "Compiles Triton's kernels in several processes, so that no later check waits for it; what is "
    "wrong with their results is the business of those.",
)
