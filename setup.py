"""Builds the C++ modules, one for each instruction set; everything else is in pyproject.toml.

The same sources are compiled with different flags. A module that cannot be built is left out, with
a warning: the reference backend needs none, and `stepfuse doctor` says what is missing.
"""

from __future__ import annotations

import copy
import os
import platform
from pathlib import Path
from typing import ClassVar

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))

# No contraction: where a product and a sum are fused is written down, so that bodies and tails,
# and the pieces that threads run, round alike. -O2, since the loops that count are vectors already.
COMMON = (
    "-std=c++17 -O2 -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-fopenmp-simd -Wall -Wextra -Wno-psabi"
)
AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
# GCC 12 warns of its own undefined vectors in avx512fintrin.h (GCC bug 105593).
AVX512 = (
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mprefer-vector-width=512 "
    "-Wno-uninitialized -Wno-maybe-uninitialized"
)

FLAGS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS["avx2"] = f"-DSTEPFUSE_AVX2 {AVX2}"
    FLAGS["avx512"] = f"-DSTEPFUSE_AVX512 {AVX2} {AVX512}"


# What `build_ext --sanitize` adds: memory and arithmetic are checked, and the first fault ends the
# process. Symbols stay in, for its report.
SANITIZED = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


class BuildModules(build_ext):
    """Builds the modules side by side, with objects of their own: they share their sources."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize", None, "check memory and arithmetic while the modules run"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        if self.sanitize:
            ext.extra_compile_args = [*ext.extra_compile_args, *SANITIZED]
            ext.extra_link_args = SANITIZED
            ext.optional = False
        super(BuildModules, own).build_extension(ext)


def module(isa: str) -> Extension:
    name = f"_cpu_{isa}"
    return Extension(
        f"stepfuse.{name}",
        SOURCES,
        depends=HEADERS,
        include_dirs=[pybind11.get_include()],
        define_macros=[("STEPFUSE_MODULE", name)],
        extra_compile_args=f"{COMMON} {FLAGS[isa]}".split(),
        extra_link_args=["-Wl,-s"] if platform.system() == "Linux" else [],
        language="c++",
        optional=True,
    )


setup(ext_modules=[module(isa) for isa in FLAGS], cmdclass={"build_ext": BuildModules})
