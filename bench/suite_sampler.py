"""Suite: the whole loop, every way we run it, beside diffusers' loop on the same weights.

python -m pytest bench/suite_sampler.py --benchmark-only [-k "digits and captured"]
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepfuse.bench.suite import Timed
from stepfuse.bench.verify import LEAST_PSNR, psnr

STEPS = {"digits": 20, "ddpm_cifar10": 5}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"graph": None},
    "captured": {},
    "optimized": {"optimize": True},
    "bfloat16": {"optimize": torch.bfloat16},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 8])
def test_sampler(timed: Timed, network: Any, batch: int, way: str) -> None:
    steps = STEPS[network.name]
    sampler = network.sampler(steps, **WAYS[way])

    def verify() -> dict[str, float]:
        if way != "bfloat16":
            return {"difference": network.verify(batch, steps, sampler)}
        exact = network.ours(network.sampler(steps), batch)
        found = psnr(network.ours(sampler, batch), exact)
        assert found > LEAST_PSNR, f"images at {found:.1f} dB: not timed"
        return {"psnr": found}

    timed(
        lambda: network.ours(sampler, batch),
        beside=lambda: network.theirs(batch, steps),
        reference="diffusers",
        dtype="bfloat16" if way == "bfloat16" else "float32",
        group=f"sampler {network.name} batch {batch}, {steps} steps",
        verify=verify,
    )
