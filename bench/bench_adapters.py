"""Other libraries' pipelines before and after `sf.accelerate`.

    python -m stepfuse.bench.bench_adapters [--json FILE] [--rounds N] [--threads N] [--match TEXT]

Each object is compared with its accelerated copy: the images first, which must agree to 50 dB in
float32, then the times, in turn in one run. A case whose images differ gets no time, and the
command fails. What a library's absence leaves out is listed with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import statistics
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stepfuse as sf
from stepfuse.bench import machine, peers_setup, script
from stepfuse.bench.able import able, described
from stepfuse.bench.adapter_cases import Case, cases
from stepfuse.bench.samples import ratio
from stepfuse.bench.timing import in_turn
from stepfuse.bench.verify import psnr

peers_setup.prepare()

LEAST = 50.0  # dB of float32 images to those before: sums in another order are far above
LEAST_BFLOAT16 = 20.0  # dB: 8 bits through all layers, which a loop takes apart; wrong is under 15
BEFORE, AFTER, HALF = "before", "after", "after, bfloat16"
OPTIONS: dict[str, dict[str, Any]] = {AFTER: {}, HALF: {"dtype": torch.bfloat16}}
LIBRARIES = ("diffusers", "denoising-diffusion-pytorch", "transformers")


class Wrong(RuntimeError):
    """The images of an accelerated object are not those of the original."""


class Pair:
    """An object and its accelerated copies, their images compared.

    A copy that cannot run here is named and left out. Raises `Wrong` where images differ, and what
    the library raises where the object itself cannot be built or run.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        original = case.build()
        self.objects = {BEFORE: original}
        before = self.run(BEFORE)

        def compared(name: str) -> float:
            self.objects[name] = sf.accelerate(copy.deepcopy(original), **OPTIONS[name])
            return psnr(self.run(name), before, least=0.0)

        makers = {f"{case}, {name}": functools.partial(compared, name) for name in OPTIONS}
        found = able(makers)
        self.psnr = {n: found[f"{case}, {n}"] for n in OPTIONS if f"{case}, {n}" in found}
        self.objects = {n: v for n, v in self.objects.items() if n in (BEFORE, *self.psnr)}
        for name, least in ((AFTER, LEAST), (HALF, LEAST_BFLOAT16)):
            if name in self.psnr and not self.psnr[name] >= least:
                raise Wrong(f"{name}: images at {self.psnr[name]:.1f} dB, under {least:g}")

    @torch.no_grad()
    def run(self, name: str) -> Tensor:
        """The images of one of them."""
        with contextlib.redirect_stderr(io.StringIO()):  # one library cannot hide its progress bar
            return self.case.run(self.objects[name])


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Compare, then time in turn."""
    pair = Pair(case)
    samples = in_turn({n: (lambda n=n: pair.run(n)) for n in pair.objects}, rounds)
    return {
        "library": case.library,
        "case": case.label,
        "psnr": pair.psnr,
        "ms": {name: statistics.median(seconds) * 1e3 for name, seconds in samples.items()},
        "times faster": {n: ratio(samples[BEFORE], samples[n]) for n in pair.psnr},
        "samples": samples,
    }


def report(rows: list[dict[str, Any]], left_out: dict[str, str], console: Console) -> None:
    """The table, and what is not in it."""
    title = "before and after sf.accelerate, medians of one run in turn"
    table = Table(title=title, caption=machine.caption())
    table.add_column("library")
    table.add_column("case")
    for heading in (BEFORE, AFTER, "faster", "PSNR dB", "faster in bf16", "PSNR dB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["library"],
            row["case"],
            f"{row['ms'][BEFORE]:.0f} ms",
            f"{row['ms'][AFTER]:.0f} ms" if AFTER in row["ms"] else "",
            *(
                text
                for name in OPTIONS
                for text in (
                    (f"{row['times faster'][name]:.2f}x", f"{row['psnr'][name]:.1f}")
                    if name in row["psnr"]
                    else ("", "")
                )
            ),
        )
    console.print(table)
    for label, reason in left_out.items():
        console.print(f"{label} left out: {reason}", markup=False, highlight=False, soft_wrap=True)


def versions() -> Iterator[tuple[str, str]]:
    """Of the libraries that are here."""
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            yield library, version(library)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the samples where asked to; 1 where images were wrong."""
    parser = script.parser(__doc__, rounds=7)
    parser.add_argument("--match", default="", help="only cases whose line contains this")
    options = script.parsed(parser, arguments)
    chosen = [case for case in cases() if options.match in str(case)]
    if not chosen:
        known = "\n  ".join(str(case) for case in cases())
        parser.error(f"no case contains {options.match!r}; there are\n  {known}")
    console = script.console(140)
    rows, left_out, wrong = [], {}, False
    with console.status("") as status:
        for case in chosen:
            status.update(str(case))
            try:
                rows.append(measure(case, options.rounds))
            except (ImportError, Wrong) as error:
                left_out[str(case)] = str(error)
                wrong = wrong or isinstance(error, Wrong)
            except Exception as error:  # of whatever library it is
                left_out[str(case)] = described(error)
    report(rows, left_out, console)
    document = {
        "machine": machine.brief(),
        "versions": dict(versions()),
        "rounds": options.rounds,
        "cases": rows,
        "left out": left_out,
    }
    script.save(options.json, document)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
