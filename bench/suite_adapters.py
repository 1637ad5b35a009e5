"""Suite: other libraries' pipelines after `sf.accelerate`, beside the same before.

python -m pytest bench/suite_adapters.py --benchmark-only [-k "DDIMPipeline and digits"]
"""

from __future__ import annotations

import functools

import pytest

from stepfuse.bench.able import described
from stepfuse.bench.bench_adapters import AFTER, BEFORE, OPTIONS, Pair, Wrong, cases
from stepfuse.bench.suite import Timed

CASES = {str(case): case for case in cases()}


@functools.lru_cache(1)
def _pair(name: str) -> Pair:
    try:
        return Pair(CASES[name])  # which raises where images are wrong
    except Wrong:
        raise
    except Exception as error:  # its library is missing, or cannot run it here
        pytest.skip(f"{name} left out: {described(error)}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", OPTIONS)
def test_accelerated(timed: Timed, name: str, way: str) -> None:
    pair = _pair(name)
    if way not in pair.psnr:
        pytest.skip(f"{name}, {way} left out: it cannot run here")
    timed(
        lambda: pair.run(way),
        beside=lambda: pair.run(BEFORE),
        reference=CASES[name].library,
        dtype="float32" if way == AFTER else "bfloat16",
        group=name,
        verify=lambda: {"psnr": pair.psnr[way]},
    )
