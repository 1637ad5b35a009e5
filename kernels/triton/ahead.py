"""Compile what the launchers launch, for a GPU that is not there, and read the result.

    with compiling(90) as kernels:                          # sm_90
        denoise_step.run(x, ...)                            # meta tensors: nothing is computed
    kernels[0].resources, kernels[0].accesses()

The launchers themselves run, so a kernel is specialised exactly as it would be on the card; only
Triton's driver is exchanged for one that knows a target and no device.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WARP = 32


@dataclass(frozen=True)
class Resources:
    """What ptxas gave one thread, or one program: registers, bytes."""

    registers: int
    stack: int
    local: int
    shared: int


@dataclass(frozen=True, eq=False)
class Compiled:
    """One launch of one kernel, compiled and not run."""

    name: str
    arch: int
    programs: int
    arguments: dict[str, Any]  # by name, constants included
    kernel: Any

    @property
    def ptx(self) -> str:
        """The PTX text."""
        return str(self.kernel.asm["ptx"])

    @property
    def warps(self) -> int:
        """Warps of one program."""
        return int(self.kernel.metadata.num_warps)

    @functools.cached_property
    def resources(self) -> Resources:
        """Registers, spills and shared memory, read from the machine code."""
        usage = _tool("cuobjdump", self.kernel.asm["cubin"], "--dump-resource-usage")
        found = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
        # a stack frame is where spills go, and local memory is what a thread cannot hold in
        # registers; Triton adds its shared memory at the launch, so ptxas knows none
        return Resources(
            registers=found["REG"],
            stack=found["STACK"],
            local=found["LOCAL"],
            shared=int(self.kernel.metadata.shared),
        )

    def accesses(self) -> dict[str, dict[str, set[int]]]:
        """Widths in bytes of the global loads and stores of each pointer argument.

        {"x": {"ld": {16}}, "out": {"st": {16}}, "step": {"ld": {8}}, ...}
        """
        return _accesses(self.ptx, self._pointers())

    def _pointers(self) -> dict[int, str]:
        """{position among the PTX parameters: name} of the pointer arguments."""
        signature = self.kernel.src.signature
        passed = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
        return {i: name for i, (name, kind) in enumerate(passed) if str(kind).startswith("*")}


class _Target:
    """The part of a Triton driver that compilation needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self) -> int:
        # keys the caches of compiled kernels: far from the number of a real device
        return 100_000 + self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Inside, ``kernel[grid](...)`` compiles for sm_<arch> and launches nothing.

    Yields the list of what was compiled, in the order of the launches. Arguments may be meta
    tensors: their address counts as aligned, which that of every PyTorch allocation is.
    """
    log: list[Compiled] = []
    real = JITFunction.run
    active = driver._active  # the public property would look for a GPU

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False))
        given |= {name: value for name, value in options.items() if name in self.arg_names}
        log.append(Compiled(self.fn.__name__, arch, grid[0], given, kernel))
        return kernel

    driver.set_active(_Target(arch))
    JITFunction.run = run
    try:
        yield log
    finally:
        JITFunction.run = real
        driver._active = active


def _tool(name: str, cubin: bytes, *options: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [program, *options, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


_ACCESS = re.compile(
    r"(ld|st)\.global((?:\.\w+(?:::\w+)*)*?)(?:\.v(\d))?\.[bfsu](\d+)\s+(\{[^}]*\}|[^,]*),?([^;]*);"
)
_REGISTER = re.compile(r"%\w+")


def _accesses(ptx: str, pointers: dict[int, str]) -> dict[str, dict[str, set[int]]]:
    """Follow the address of every global access back to the parameter it was made from."""
    sources: dict[str, set[str]] = {}  # register -> registers it was computed from
    parameters: dict[str, int] = {}  # register -> parameter it was loaded from
    found: list[tuple[str, int, str]] = []
    for statement in re.split(r"(?<=;)", ptx):
        if match := re.search(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", statement):
            parameters[match[1]] = int(match[2])
        elif match := _ACCESS.search(statement):
            kind, _, vector, bits, first, second = match.groups()
            address = second if kind == "ld" else first
            if kind == "st":
                address = re.search(r"\[[^\]]*\]", match[0])[0]  # type: ignore[index]
            width = int(bits) // 8 * int(vector or 1)
            found.append((kind, width, _REGISTER.findall(address)[0]))
        else:
            registers = _REGISTER.findall(statement)
            if registers:
                sources.setdefault(registers[0], set()).update(registers[1:])
    result: dict[str, dict[str, set[int]]] = {}
    for kind, width, register in found:
        for name in _origins(register, sources, parameters, pointers):
            result.setdefault(name, {}).setdefault(kind, set()).add(width)
    return result


def _origins(
    register: str, sources: dict[str, set[str]], parameters: dict[str, int], names: dict[int, str]
) -> set[str]:
    seen, todo, origins = {register}, [register], set()
    while todo:
        current = todo.pop()
        if parameters.get(current) in names:
            origins.add(names[parameters[current]])
        fresh = sources.get(current, set()) - seen
        seen |= fresh
        todo += fresh
    return origins
