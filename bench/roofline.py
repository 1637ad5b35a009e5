"""What the compiled Triton kernels need, and how long memory bandwidth lets them take.

    python -m stepfuse.bench.roofline [--arch 80 90 100 120] [--json FILE]

No GPU is used: kernels are compiled for each architecture and the machine code is read. Bytes are
those an op has to move at least (`tests/kernels/test_triton_sim.py` counts them in execution); the
time is bytes divided by the bandwidth in the card's datasheet, a bound that no kernel reaches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stepfuse.bench.able import able
from stepfuse.engine.files.writing import check_file, write_file
from stepfuse.kernels.torch_names import TorchDispatchMode, tree_leaves
from stepfuse.kernels.triton import variants
from stepfuse.kernels.triton.variants import BULK, Kernel

# sm -> (card, GB/s of its memory by the datasheet)
CARDS = {
    80: ("A100 80GB SXM", 2039),
    90: ("H100 SXM", 3350),
    100: ("B200", 8000),
    120: ("RTX 5090 / RTX PRO 6000", 1792),
}


@dataclass(frozen=True)
class Row:
    """One op variant on one architecture; its kernels' registers and shared memory side by side."""

    variant: str
    arch: int
    card: str
    gigabytes_per_second: int
    kernels: tuple[str, ...]
    registers: tuple[int, ...]
    shared_bytes: tuple[int, ...]
    spilled: bool
    vector_bits: int  # the narrowest bulk access outside a tail
    bytes_per_element: float
    microseconds: float
    unfused_bytes_per_element: float | None
    unfused_microseconds: float | None


class Traffic(TorchDispatchMode):
    """Adds up what each PyTorch operator reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = {id(v): v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)}
            self.bytes += sum(_size(v) for v in read.values() if func not in _WRITE_ONLY)
            self.bytes += sum(_size(v) for v in tree_leaves(result) if isinstance(v, torch.Tensor))
        return result


_ATEN = torch.ops.aten
_WRITE_ONLY = {_ATEN.randn_like.default, _ATEN.empty_like.default}


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def traffic(unfused: Callable[[], Any]) -> int:
    """Bytes that ``unfused`` moves as separate operators."""
    with Traffic() as counted:
        unfused()
    return counted.bytes


def static_table(
    archs: Sequence[int] = tuple(CARDS), kernels: dict[int, list[Kernel]] | None = None
) -> list[Row]:
    """One row a variant and architecture; ``kernels`` saves compiling what is compiled already."""
    for arch in archs:
        if arch not in CARDS:
            raise ValueError(f"arch must be among {', '.join(map(str, CARDS))}; got {arch}")
    kernels = kernels or compile_all(archs)
    listed = variants.variants()
    unfused = [None if v.unfused is None else traffic(v.unfused) for v in listed]
    rows = []
    for arch in (arch for arch in archs if arch in kernels):
        card, bandwidth = CARDS[arch]
        for variant, other in zip(listed, unfused, strict=True):
            own = [k for k in kernels[arch] if k.variant == variant.name]
            rows.append(
                Row(
                    variant=variant.name,
                    arch=arch,
                    card=card,
                    gigabytes_per_second=bandwidth,
                    kernels=tuple(k.kernel for k in own),
                    registers=tuple(k.resources.registers for k in own),
                    shared_bytes=tuple(k.resources.shared for k in own),
                    spilled=any(k.resources.stack or k.resources.local for k in own),
                    vector_bits=8 * min(_vector(k) for k in own),
                    bytes_per_element=variant.bytes / variant.elements,
                    microseconds=variant.bytes / bandwidth / 1e3,
                    unfused_bytes_per_element=other and other / variant.elements,
                    unfused_microseconds=other and other / bandwidth / 1e3,
                )
            )
    return rows


def compile_all(archs: Sequence[int]) -> dict[int, list[Kernel]]:
    """Every variant for every architecture, as many architectures at a time as there are cores.

    One that the compiler here does not know is named and left out.
    """
    spawn = multiprocessing.get_context("spawn")
    workers = min(len(archs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        started = {arch: pool.submit(variants.compiled, arch) for arch in archs}
        found = able({f"sm_{arch}": future.result for arch, future in started.items()})
    return {arch: found[f"sm_{arch}"] for arch in archs if f"sm_{arch}" in found}


def _vector(kernel: Kernel) -> int:
    """Bytes of the narrowest of the widest accesses to each bulk argument."""
    bulk = [kinds for name, kinds in kernel.accesses.items() if name in BULK]
    return min((max(widths) for kinds in bulk for widths in kinds.values()), default=16)


def render(rows: Sequence[Row]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title="Triton kernels, compiled: what they need and what bandwidth allows")
    for name in ("variant", "sm", "registers", "shared", "vector", "B/element", "us", "us unfused"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        table.add_row(
            row.variant,
            str(row.arch),
            " ".join(map(str, row.registers)) + (" spills" if row.spilled else ""),
            f"{max(row.shared_bytes) / 1024:.1f} KiB",
            f"{row.vector_bits} bit",
            f"{row.bytes_per_element:g}" + _against(row.unfused_bytes_per_element),
            f"{row.microseconds:.2f}",
            "" if row.unfused_microseconds is None else f"{row.unfused_microseconds:.2f}",
            end_section=row is rows[-1] or rows[rows.index(row) + 1].arch != row.arch,
        )
    cards = ", ".join(f"sm_{arch} {card} {speed} GB/s" for arch, (card, speed) in CARDS.items())
    table.caption = f"Datasheet bandwidth: {cards}. In brackets, us unfused: PyTorch's operators."
    return table


def _against(unfused: float | None) -> str:
    return "" if unfused is None else f" ({unfused:.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it as JSON too where asked."""
    parser = argparse.ArgumentParser(prog="python -m stepfuse.bench.roofline", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.json:
        check_file(options.json)
    rows = static_table(options.arch)
    Console(width=160).print(render(rows))
    if options.json:
        text = json.dumps([asdict(row) for row in rows], indent=1)
        write_file(options.json, f"{text}\n".encode())


if __name__ == "__main__":
    main()
